// The optional CPU accelerator: the packed-bit passes as loops that a compiler vectorises, one pass over memory each.
//
// Plain C ABI, no torch headers (it compiles in seconds); native.py binds it. Every function gives the same bits as the
// torch version beside its Python name: built with -ffp-contract=off, sums in a fixed order that does not depend on the
// number of threads. Layout of a plane: see layout.py (bit b of word w is column 32 w + b, bit 1 means -1).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int kWordBits = 32;
constexpr int kMaxPlanes = 8;
constexpr int kRowsPerBlock = 32;  // rows whose column sums are kept together: fixes the order of summation

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline uint16_t to_bf16(float value) {  // round to nearest even; a NaN stays a NaN
  uint32_t bits = as_bits(value);
  uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}

inline void store(float value, float* out) { *out = value; }
inline void store(float value, uint16_t* out) { *out = to_bf16(value); }
inline float load(const float* in) { return *in; }
inline float load(const uint16_t* in) { return as_float(static_cast<uint32_t>(*in) << 16); }

// The sign bit of column b, in place of an IEEE sign.
inline uint32_t sign_mask(uint32_t word, int b) { return (word << (31 - b)) & 0x80000000u; }

// Calls body(std::integral_constant<int, K>) with K = planes, so that loops over planes have a fixed length.
template <typename Body>
void with_planes(int64_t planes, Body body) {
  switch (planes) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, 3>{});
    case 4: return body(std::integral_constant<int, 4>{});
    case 5: return body(std::integral_constant<int, 5>{});
    case 6: return body(std::integral_constant<int, 6>{});
    case 7: return body(std::integral_constant<int, 7>{});
    case 8: return body(std::integral_constant<int, 8>{});
  }
}

struct Planes {
  const int32_t* words[kMaxPlanes];
  const float* scale_out;  // (K, row_stride)
  const float* scale_in;   // (K, n)
  int64_t count, out_stride, rows, columns, words_per_row;
};

struct Signals {  // each G * outer(row_factor, column_factor), as values or as words and magnitudes
  const float* row_factor[kMaxPlanes];
  const float* column_factor[kMaxPlanes];
  float* values[kMaxPlanes];      // (rows, 32 words_per_row), or null
  uint32_t* words[kMaxPlanes];    // (rows, words_per_row), or null
  float* magnitudes[kMaxPlanes];  // (rows), with words
  int64_t count;
};

template <int K, typename Out>
void dequantize(const Planes& p, Out* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < p.rows; ++i) {
    for (int64_t w = 0; w < p.words_per_row; ++w) {
      const int64_t first = w * kWordBits;
      const int width = static_cast<int>(std::min<int64_t>(kWordBits, p.columns - first));
      float sum[kWordBits] = {};
      for (int k = 0; k < K; ++k) {
        const uint32_t word = p.words[k][i * p.words_per_row + w];
        const float row_scale = p.scale_out[k * p.out_stride + i];
        const float* in = p.scale_in + k * p.columns + first;
        if (width == kWordBits) {
          for (int b = 0; b < kWordBits; ++b)
            sum[b] += row_scale * as_float(as_bits(in[b]) ^ sign_mask(word, b));
        } else {
          for (int b = 0; b < width; ++b)
            sum[b] += row_scale * as_float(as_bits(in[b]) ^ sign_mask(word, b));
        }
      }
      Out* row = out + i * p.columns + first;
      if (width == kWordBits) {
        for (int b = 0; b < kWordBits; ++b) store(sum[b], row + b);
      } else {
        for (int b = 0; b < width; ++b) store(sum[b], row + b);
      }
    }
  }
}

// Bit b is set where value b is less than 0.
inline uint32_t negative_bits(const float* value) {
#ifdef __AVX512F__
  const __m512 zero = _mm512_setzero_ps();
  const uint32_t low = _mm512_cmp_ps_mask(_mm512_loadu_ps(value), zero, _CMP_LT_OQ);
  const uint32_t high = _mm512_cmp_ps_mask(_mm512_loadu_ps(value + 16), zero, _CMP_LT_OQ);
  return low | (high << 16);
#else
  uint32_t word = 0;
  for (int b = 0; b < kWordBits; ++b) word |= static_cast<uint32_t>(value[b] < 0.0f) << b;
  return word;
#endif
}

// Sign words of rows and, where ``sums`` is given, the sum of each row's magnitudes.
template <typename In>
void pack_signs(const In* values, int64_t rows, int64_t columns, uint32_t* words, float* sums, int threads) {
  const int64_t row_words = (columns + kWordBits - 1) / kWordBits;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    float sizes[kWordBits] = {};
    for (int64_t w = 0; w < row_words; ++w) {
      const In* source = values + i * columns + w * kWordBits;
      const int64_t width = std::min<int64_t>(kWordBits, columns - w * kWordBits);
      float value[kWordBits] = {};
      if (width == kWordBits) {
        for (int b = 0; b < kWordBits; ++b) value[b] = load(source + b);
      } else {
        for (int64_t b = 0; b < width; ++b) value[b] = load(source + b);
      }
      words[i * row_words + w] = negative_bits(value);
      if (sums)
        for (int b = 0; b < kWordBits; ++b) sizes[b] += std::fabs(value[b]);
    }
    if (!sums) continue;
    float total = 0.0f;
    for (int b = 0; b < kWordBits; ++b) total += sizes[b];
    sums[i] = total;
  }
}

template <int K, typename In>
void backward(const Planes& p, const In* gradient, float* grad_out, int64_t grad_out_stride, float* grad_in,
              const Signals& out, int threads) {
  const int64_t blocks = (p.rows + kRowsPerBlock - 1) / kRowsPerBlock;
  const int64_t padded = p.words_per_row * kWordBits;
  // The trailing columns of a ragged last word read zeros from these padded copies.
  std::vector<float> in(K * padded, 0.0f), column(out.count * padded, 0.0f);
  for (int k = 0; k < K; ++k) std::copy_n(p.scale_in + k * p.columns, p.columns, in.data() + k * padded);
  for (int64_t s = 0; s < out.count; ++s) std::copy_n(out.column_factor[s], p.columns, column.data() + s * padded);
  std::vector<float> partial(blocks * K * padded);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    float* sums = partial.data() + block * K * padded;
    std::fill_n(sums, K * padded, 0.0f);
    const int64_t last = std::min(p.rows, (block + 1) * kRowsPerBlock);
    for (int64_t i = block * kRowsPerBlock; i < last; ++i) {
      float lanes[K][kWordBits] = {}, sizes[kMaxPlanes][kWordBits] = {};
      float row_scale[K];
      for (int k = 0; k < K; ++k) row_scale[k] = p.scale_out[k * p.out_stride + i];
      for (int64_t w = 0; w < p.words_per_row; ++w) {
        const int64_t first = w * kWordBits;
        const In* source = gradient + i * p.columns + first;
        float g[kWordBits];
        if (first + kWordBits <= p.columns) {
          for (int b = 0; b < kWordBits; ++b) g[b] = load(source + b);
        } else {
          for (int b = 0; b < kWordBits; ++b) g[b] = first + b < p.columns ? load(source + b) : 0.0f;
        }
        for (int k = 0; k < K; ++k) {
          const uint32_t word = p.words[k][i * p.words_per_row + w];
          const float* in_k = in.data() + k * padded + first;
          float* sums_k = sums + k * padded + first;
          for (int b = 0; b < kWordBits; ++b) {
            const float signed_g = as_float(as_bits(g[b]) ^ sign_mask(word, b));
            lanes[k][b] += signed_g * in_k[b];
            sums_k[b] += signed_g * row_scale[k];
          }
        }
        for (int64_t s = 0; s < out.count; ++s) {
          const float row = out.row_factor[s][i];
          const float* factor = column.data() + s * padded + first;
          if (out.words[s]) {
            float value[kWordBits];
            for (int b = 0; b < kWordBits; ++b) value[b] = g[b] * row * factor[b];
            for (int b = 0; b < kWordBits; ++b) sizes[s][b] += first + b < p.columns ? std::fabs(value[b]) : 0.0f;
            out.words[s][i * p.words_per_row + w] = negative_bits(value);
            continue;
          }
          float* target = out.values[s] + i * padded + first;
          for (int b = 0; b < kWordBits; ++b) target[b] = g[b] * row * factor[b];
          if (first + kWordBits > p.columns)  // padding stays 0 even where g is not finite
            for (int64_t b = p.columns - first; b < kWordBits; ++b) target[b] = 0.0f;
        }
      }
      for (int k = 0; k < K; ++k) {
        float total = 0.0f;
        for (int b = 0; b < kWordBits; ++b) total += lanes[k][b];
        grad_out[k * grad_out_stride + i] = total;
      }
      for (int64_t s = 0; s < out.count; ++s) {
        if (!out.words[s]) continue;
        float total = 0.0f;
        for (int b = 0; b < kWordBits; ++b) total += sizes[s][b];
        out.magnitudes[s][i] = total / static_cast<float>(p.columns);
      }
    }
  }
  for (int k = 0; k < K; ++k)
    for (int64_t block = 0; block < blocks; ++block) {
      const float* sums = partial.data() + (block * K + k) * padded;
      for (int64_t j = 0; j < p.columns; ++j) grad_in[k * p.columns + j] += sums[j];
    }
}

constexpr int kRowsTogether = 8;  // rows that share a load of the inputs: independent sums hide an addition's latency

// sums[r] = sum over columns of B x for `count` rows of words; `x` is padded with zeros, `whole` is its sum.
void signed_sums(const int32_t* words, int64_t words_per_row, const float* x, float whole, int count, float* sums) {
#ifdef __AVX512F__
  // sum B x = sum x - 2 sum_{bit set} x: a masked addition for 16 weights, the mask straight from memory.
  __m512 lanes[kRowsTogether];
  for (int r = 0; r < kRowsTogether; ++r) lanes[r] = _mm512_setzero_ps();
  const uint16_t* row[kRowsTogether];
  for (int r = 0; r < kRowsTogether; ++r)  // rows past the last read the first again
    row[r] = reinterpret_cast<const uint16_t*>(words + (r < count ? r : 0) * words_per_row);
  for (int64_t h = 0; h < 2 * words_per_row; ++h) {
    const __m512 value = _mm512_loadu_ps(x + 16 * h);
    for (int r = 0; r < kRowsTogether; ++r) lanes[r] = _mm512_mask_add_ps(lanes[r], row[r][h], lanes[r], value);
  }
  for (int r = 0; r < count; ++r) sums[r] = whole - 2.0f * _mm512_reduce_add_ps(lanes[r]);
#else
  for (int r = 0; r < count; ++r) {
    float lanes[kWordBits] = {};
    for (int64_t w = 0; w < words_per_row; ++w) {
      const uint32_t word = static_cast<uint32_t>(words[r * words_per_row + w]);
      for (int b = 0; b < kWordBits; ++b) lanes[b] += as_float(as_bits(x[w * kWordBits + b]) ^ sign_mask(word, b));
    }
    float total = 0.0f;
    for (int b = 0; b < kWordBits; ++b) total += lanes[b];
    sums[r] = total;
  }
  (void)whole;
#endif
}

// Rows of all `weights` by one team of threads; y is (tokens, their rows side by side).
void linear_decode(const Planes* weights, int64_t num_weights, const float* x, int64_t tokens, float* y, int threads) {
  const int64_t columns = weights[0].columns, padded = weights[0].words_per_row * kWordBits, planes = weights[0].count;
  std::vector<int64_t> first_row(num_weights + 1, 0), first_turn(num_weights + 1, 0);
  for (int64_t i = 0; i < num_weights; ++i) {
    first_row[i + 1] = first_row[i] + weights[i].rows;
    first_turn[i + 1] = first_turn[i] + (weights[i].rows + kRowsTogether - 1) / kRowsTogether;
  }
  const int64_t num_inputs = num_weights * planes * tokens;
  std::vector<float> inputs(num_inputs * padded, 0.0f), whole(num_inputs);  // s_in x, and its sums
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t input = 0; input < num_inputs; ++input) {
      const int64_t t = input % tokens, k = input / tokens % planes;
      const float* scale = weights[input / tokens / planes].scale_in + k * columns;
      float* scaled = inputs.data() + input * padded;
      float lanes[kWordBits] = {}, total = 0.0f;
      for (int64_t j = 0; j < columns; ++j) scaled[j] = x[t * columns + j] * scale[j];
      for (int64_t j = 0; j < padded; ++j) lanes[j % kWordBits] += scaled[j];
      for (int b = 0; b < kWordBits; ++b) total += lanes[b];
      whole[input] = total;
    }
#pragma omp for schedule(static)
    for (int64_t turn = 0; turn < first_turn[num_weights]; ++turn) {
      int64_t i = 0;
      while (turn >= first_turn[i + 1]) ++i;
      const Planes& p = weights[i];
      const int64_t first = (turn - first_turn[i]) * kRowsTogether;
      const int count = static_cast<int>(std::min<int64_t>(kRowsTogether, p.rows - first));
      for (int64_t t = 0; t < tokens; ++t) {
        float result[kRowsTogether] = {}, sums[kRowsTogether];
        for (int64_t k = 0; k < planes; ++k) {
          const int64_t input = (i * planes + k) * tokens + t;
          signed_sums(p.words[k] + first * p.words_per_row, p.words_per_row, inputs.data() + input * padded,
                      whole[input], count, sums);
          for (int r = 0; r < count; ++r) result[r] += p.scale_out[k * p.out_stride + first + r] * sums[r];
        }
        std::copy_n(result, count, y + t * first_row[num_weights] + first_row[i] + first);
      }
    }
  }
}

template <typename In>
void square_sums(const In* values, int64_t rows, int64_t columns, double* sums, int threads) {
  constexpr int64_t kSlice = 64, kBurst = 64;  // fp32 sums of 64 rows, added up in fp64
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < columns; first += kSlice) {
    const int64_t width = std::min(kSlice, columns - first);
    double total[kSlice] = {};
    for (int64_t start = 0; start < rows; start += kBurst) {
      float burst[kSlice] = {};
      const int64_t stop = std::min(rows, start + kBurst);
      if (width == kSlice) {
        for (int64_t t = start; t < stop; ++t)
          for (int64_t j = 0; j < kSlice; ++j) {
            const float v = load(values + t * columns + first + j);
            burst[j] += v * v;
          }
      } else {
        for (int64_t t = start; t < stop; ++t)
          for (int64_t j = 0; j < width; ++j) {
            const float v = load(values + t * columns + first + j);
            burst[j] += v * v;
          }
      }
      for (int64_t j = 0; j < kSlice; ++j) total[j] += burst[j];
    }
    std::copy_n(total, width, sums + first);
  }
}

template <int K>
void nearest_levels(const float* weight, int64_t rows, int64_t columns, const float* scale_out, const float* scale_in,
                    uint8_t* codes, int threads) {
  constexpr int64_t kWidth = 64;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t first = 0; first < columns; first += kWidth) {
      const int64_t width = std::min(kWidth, columns - first);
      float w[kWidth] = {}, magnitude[K][kWidth] = {}, best[kWidth];
      int32_t nearest[kWidth] = {};
      std::copy_n(weight + i * columns + first, width, w);
      for (int k = 0; k < K; ++k) {
        const float row = scale_out[k * rows + i];
        for (int64_t j = 0; j < width; ++j) magnitude[k][j] = row * scale_in[k * columns + first + j];
      }
      for (int code = 0; code < (1 << K); ++code)
        for (int64_t j = 0; j < kWidth; ++j) {  // the level is written out: gcc vectorises no call of a helper here
          float level = code & 1 ? -magnitude[0][j] : magnitude[0][j];
          for (int k = 1; k < K; ++k) level = (code >> k) & 1 ? level - magnitude[k][j] : level + magnitude[k][j];
          const float distance = std::fabs(w[j] - level);
          const bool nearer = code == 0 || distance < best[j];
          best[j] = nearer ? distance : best[j];
          nearest[j] = nearer ? code : nearest[j];
        }
      for (int64_t j = 0; j < width; ++j) codes[i * columns + first + j] = static_cast<uint8_t>(nearest[j]);
    }
  }
}

template <int K>
void feed_errors_forward(float* columns, int64_t rows, int64_t width, const float* scale_out, const float* scale_in,
                         const float* upper, uint8_t* codes, float* errors, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    float* left = columns + i * width;
    for (int64_t j = 0; j < width; ++j) {
      float best = 0.0f, chosen = 0.0f;
      int code = 0;
      float magnitude[K];
      for (int k = 0; k < K; ++k) magnitude[k] = scale_out[k * rows + i] * scale_in[k * width + j];
      for (int c = 0; c < (1 << K); ++c) {
        float level = c & 1 ? -magnitude[0] : magnitude[0];
        for (int k = 1; k < K; ++k) level = (c >> k) & 1 ? level - magnitude[k] : level + magnitude[k];
        const float distance = std::fabs(left[j] - level);
        if (c == 0 || distance < best) best = distance, chosen = level, code = c;
      }
      const float error = (left[j] - chosen) / upper[j * width + j];
      codes[i * width + j] = static_cast<uint8_t>(code);
      errors[i * width + j] = error;
      const float* row = upper + j * width;
      for (int64_t later = j + 1; later < width; ++later) left[later] -= row[later] * error;
    }
  }
}

inline uint32_t lowbias32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The draws of 32 elements in a row, the first of even number ``2 pair``; see random.py.
inline void random_of_word(uint32_t pair, uint32_t key, int32_t* draws) {
  for (int h = 0; h < kWordBits / 2; ++h) {
    const uint32_t mixed = lowbias32((pair + h) * 0x9E3779B9u + key);
    draws[2 * h] = static_cast<int32_t>(mixed & 0x7FFFu);
    draws[2 * h + 1] = static_cast<int32_t>(mixed >> 17);
  }
}

// To nearest even by the magic number 1.5 * 2^23: for |value| < 2^22, and it vectorises everywhere.
inline int32_t rounded(float value) { return static_cast<int32_t>((value + 12582912.0f) - 12582912.0f); }

inline float finite(float value) { return std::fabs(value) < INFINITY ? value : 0.0f; }

inline float clamped(float value, float limit) {  // 0 for a NaN
  value = value == value ? value : 0.0f;
  return std::min(std::max(value, -limit), limit);
}

// The largest magnitude of a row. Magnitudes compare as integers do, and a NaN is above infinity.
inline float largest(const float* row, int64_t row_words) {
  int32_t most[kWordBits] = {};
  for (int64_t w = 0; w < row_words; ++w)
    for (int b = 0; b < kWordBits; ++b)
      most[b] = std::max(most[b], static_cast<int32_t>(as_bits(row[w * kWordBits + b]) & 0x7FFFFFFFu));
  return as_float(static_cast<uint32_t>(*std::max_element(most, most + kWordBits)));
}

inline float inverse_of(float size) { return size > 0.0f ? 1.0f / size : 0.0f; }

template <int Bits>
void encode_rows(const float* values, int64_t rows, int64_t row_words, float inverse_of_most, uint8_t* words,
                 float* sizes, int threads) {
  constexpr float most = (1 << (Bits - 1)) - 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float inverse =
        inverse_of(sizes[row] = largest(values + row * row_words * kWordBits, row_words) * inverse_of_most);
    for (int64_t at = row * row_words; at < (row + 1) * row_words; ++at) {
      int32_t codes[kWordBits];
      for (int b = 0; b < kWordBits; ++b) codes[b] = rounded(clamped(values[at * kWordBits + b] * inverse, most));
      uint8_t* target = words + at * 4 * Bits;
      if constexpr (Bits == 8) {
        for (int b = 0; b < kWordBits; ++b) target[b] = static_cast<uint8_t>(codes[b]);
      } else {
        uint64_t pairs[kWordBits / 2];
        std::memcpy(pairs, codes, sizeof pairs);
        for (int b = 0; b < kWordBits / 2; ++b)
          target[b] = static_cast<uint8_t>((pairs[b] & 15u) | ((pairs[b] >> 28) & 0xF0u));
      }
    }
  }
}

template <int Bits>
void decode_rows(const uint8_t* words, const float* sizes, const float* columns, int64_t rows, int64_t row_words,
                 float* values, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t w = 0; w < row_words; ++w) {
      const uint8_t* source = words + (row * row_words + w) * 4 * Bits;
      const float* column = columns + w * kWordBits;
      float* target = values + (row * row_words + w) * kWordBits;
      if constexpr (Bits == 1) {
        uint32_t word;
        std::memcpy(&word, source, 4);
        for (int b = 0; b < kWordBits; ++b)
          target[b] = as_float(as_bits(sizes[row] * column[b]) ^ sign_mask(word, b));
      } else {
        int32_t codes[kWordBits];
        if constexpr (Bits == 8) {
          for (int b = 0; b < kWordBits; ++b) codes[b] = static_cast<int8_t>(source[b]);
        } else {
          uint32_t word[4];
          std::memcpy(word, source, sizeof word);
          for (int b = 0; b < kWordBits; ++b) codes[b] = static_cast<int32_t>(word[b / 8] << (28 - 4 * (b % 8))) >> 28;
        }
        for (int b = 0; b < kWordBits; ++b) target[b] = static_cast<float>(codes[b]) * sizes[row] * column[b];
      }
    }
  }
}

// The accumulators of the 32 weights of a word: a byte each, or two in a byte (see accumulator.py).
template <bool pairs>
inline void load_values(const uint8_t* stored, int64_t word, int8_t* values) {
  if constexpr (pairs) {
    const uint8_t* from = stored + word * (kWordBits / 2);
    uint16_t both[kWordBits / 2];  // each half in a byte of its own: what vectorises
    for (int h = 0; h < kWordBits / 2; ++h) both[h] = static_cast<uint16_t>((from[h] & 0x0F) | (from[h] & 0xF0) << 4);
    std::memcpy(values, both, kWordBits);
    for (int b = 0; b < kWordBits; ++b) values[b] = static_cast<int8_t>((values[b] ^ 8) - 8);  // extends the sign
  } else {
    std::memcpy(values, stored + word * kWordBits, kWordBits);
  }
}

template <bool pairs>
inline void store_values(const int8_t* values, uint8_t* stored, int64_t word) {
  if constexpr (pairs) {
    uint8_t* to = stored + word * (kWordBits / 2);
    uint16_t both[kWordBits / 2];
    std::memcpy(both, values, kWordBits);
    for (int h = 0; h < kWordBits / 2; ++h) to[h] = static_cast<uint8_t>((both[h] & 0x0F) | (both[h] >> 4 & 0xF0));
  } else {
    std::memcpy(stored + word * kWordBits, values, kWordBits);
  }
}

template <bool pairs>
void accumulate_signal(uint8_t* accumulator, const float* signals, int64_t contributions, int64_t elements,
                       int32_t beta_q15, int32_t limit_q, const uint32_t* keys, int64_t first_element, float unit,
                       int32_t bound, int threads) {
  const float limit = static_cast<float>(limit_q);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t word = 0; word < elements / kWordBits; ++word) {
    const int64_t start = word * kWordBits;
    int8_t values[kWordBits];
    int32_t state[kWordBits];
    load_values<pairs>(accumulator, word, values);
    for (int b = 0; b < kWordBits; ++b) state[b] = values[b];
    int32_t beta = beta_q15;
    for (int64_t c = 0; c < contributions; ++c) {
      const float* signal = signals + c * elements + start;
      const uint32_t pair = static_cast<uint32_t>((first_element + start) / 2);
      int32_t random[kWordBits];
      random_of_word(pair, keys[c], random);
      for (int b = 0; b < kWordBits; ++b) {
        const int32_t whole = rounded(clamped(finite(signal[b]) * unit, limit));
        const int32_t moved = (state[b] * beta + whole + random[b]) >> 15;
        state[b] = std::min(std::max(moved, -bound), bound);
      }
      beta = 1 << 15;
    }
    for (int b = 0; b < kWordBits; ++b) values[b] = static_cast<int8_t>(state[b]);
    store_values<pairs>(values, accumulator, word);
  }
}

// How many elements of each block of words stand at the threshold or above; where ``found`` is given, ``places`` holds
// the number of those before each block instead, and the elements and their values are written.
template <bool pairs>
void find_candidates(const uint8_t* accumulator, const int32_t* words, int64_t num_words, int64_t block_words,
                     int threshold, int64_t* places, int32_t* found, int8_t* found_values, int threads) {
  const int64_t blocks = (num_words + block_words - 1) / block_words;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t place = found ? places[block] : 0;
    if (found && place == places[block + 1]) continue;
    for (int64_t w = block * block_words; w < std::min(num_words, (block + 1) * block_words); ++w) {
      int8_t values[kWordBits], ranks[kWordBits], top = -128;
      load_values<pairs>(accumulator, w, values);
      for (int b = 0; b < kWordBits; ++b) {  // accumulator times sign, or its size
        const bool negative = words ? (static_cast<uint32_t>(words[w]) >> b) & 1u : values[b] < 0;
        const int8_t mask = static_cast<int8_t>(-static_cast<int8_t>(negative));  // 0 or -1
        ranks[b] = static_cast<int8_t>((values[b] ^ mask) - mask);
      }
      for (int b = 0; b < kWordBits; ++b) top = std::max(top, ranks[b]);
      if (top < threshold) continue;
      for (int b = 0; b < kWordBits; ++b)
        if (ranks[b] >= threshold) {
          if (found) {
            found[place] = static_cast<int32_t>(w * kWordBits + b);
            found_values[place] = values[b];
          }
          ++place;
        }
    }
    if (!found) places[block] = place;
  }
}

}  // namespace

extern "C" {

void mbdist_dequantize(const Planes* planes, void* out, int is_bf16, int threads) {
  with_planes(planes->count, [&](auto k) {
    if (is_bf16)
      dequantize<k>(*planes, static_cast<uint16_t*>(out), threads);
    else
      dequantize<k>(*planes, static_cast<float*>(out), threads);
  });
}

void mbdist_pack_signs(const void* values, int is_bf16, int64_t rows, int64_t columns, uint32_t* words, float* sums,
                       int threads) {
  if (is_bf16)
    pack_signs(static_cast<const uint16_t*>(values), rows, columns, words, sums, threads);
  else
    pack_signs(static_cast<const float*>(values), rows, columns, words, sums, threads);
}

void mbdist_scale_gradients_and_signals(const Planes* planes, const void* gradient, int is_bf16, float* grad_out,
                                        int64_t grad_out_stride, float* grad_in, const Signals* signals, int threads) {
  with_planes(planes->count, [&](auto k) {
    if (is_bf16)
      backward<k>(*planes, static_cast<const uint16_t*>(gradient), grad_out, grad_out_stride, grad_in, *signals,
                  threads);
    else
      backward<k>(*planes, static_cast<const float*>(gradient), grad_out, grad_out_stride, grad_in, *signals, threads);
  });
}

void mbdist_linear_decode(const Planes* weights, int64_t num_weights, const float* x, int64_t tokens, float* y,
                          int threads) {
  linear_decode(weights, num_weights, x, tokens, y, threads);
}

void mbdist_column_square_sums(const void* values, int is_bf16, int64_t rows, int64_t columns, double* sums,
                               int threads) {
  if (is_bf16)
    square_sums(static_cast<const uint16_t*>(values), rows, columns, sums, threads);
  else
    square_sums(static_cast<const float*>(values), rows, columns, sums, threads);
}

void mbdist_accumulate_signal(uint8_t* accumulator, int in_pairs, const float* signals, int64_t contributions,
                              int64_t elements, int32_t beta_q15, int32_t limit_q, const uint32_t* keys,
                              int64_t first_element, float unit, int32_t bound, int threads) {
  (in_pairs ? accumulate_signal<true> : accumulate_signal<false>)(
      accumulator, signals, contributions, elements, beta_q15, limit_q, keys, first_element, unit, bound, threads);
}

void mbdist_nearest_levels(const float* weight, int64_t rows, int64_t columns, const float* scale_out,
                           const float* scale_in, int64_t planes, uint8_t* codes, int threads) {
  with_planes(planes, [&](auto k) { nearest_levels<k>(weight, rows, columns, scale_out, scale_in, codes, threads); });
}

void mbdist_feed_errors_forward(float* columns, int64_t rows, int64_t width, const float* scale_out,
                                const float* scale_in, int64_t planes, const float* upper, uint8_t* codes,
                                float* errors, int threads) {
  with_planes(planes, [&](auto k) {
    feed_errors_forward<k>(columns, rows, width, scale_out, scale_in, upper, codes, errors, threads);
  });
}

void mbdist_encode_rows(const float* values, int64_t rows, int64_t row_words, int bits, float inverse_of_most,
                        uint8_t* words, float* sizes, int threads) {
  if (bits == 8)
    encode_rows<8>(values, rows, row_words, inverse_of_most, words, sizes, threads);
  else
    encode_rows<4>(values, rows, row_words, inverse_of_most, words, sizes, threads);
}

void mbdist_draw_signs(const float* values, int64_t rows, int64_t row_words, uint32_t key, uint32_t* words,
                       float* sizes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float inverse = inverse_of(sizes[row] = largest(values + row * row_words * kWordBits, row_words));
    for (int64_t at = row * row_words; at < (row + 1) * row_words; ++at) {
      int32_t draw[kWordBits];
      random_of_word(static_cast<uint32_t>(at) * (kWordBits / 2), key, draw);
      float below[kWordBits];
      for (int b = 0; b < kWordBits; ++b)
        below[b] = values[at * kWordBits + b] * inverse * 16384.0f + 16383.5f - static_cast<float>(draw[b]);
      words[at] = negative_bits(below);
    }
  }
}

void mbdist_decode_rows(const uint8_t* words, const float* sizes, const float* columns, int64_t rows,
                        int64_t row_words, int bits, float* values, int threads) {
  if (bits == 8)
    decode_rows<8>(words, sizes, columns, rows, row_words, values, threads);
  else if (bits == 4)
    decode_rows<4>(words, sizes, columns, rows, row_words, values, threads);
  else
    decode_rows<1>(words, sizes, columns, rows, row_words, values, threads);
}

void mbdist_find_candidates(const uint8_t* accumulator, int in_pairs, const int32_t* words, int64_t num_words,
                            int64_t block_words, int threshold, int64_t* places, int32_t* found, int8_t* values,
                            int threads) {
  (in_pairs ? find_candidates<true> : find_candidates<false>)(accumulator, words, num_words, block_words, threshold,
                                                              places, found, values, threads);
}

}  // extern "C"
