"""The command line."""

import gzip
import json
import subprocess

import models
import processes
import pytest
import torch

from mbdist.model.loading import ModelConfig, load_model


def mbdist(*arguments, check=True, cwd=None):
    done = processes.mbdist(*arguments, cwd=cwd).wait(120)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert done.returncode == 2, (done.returncode, done.stderr[-3000:])
        assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def converted(tmp_path_factory, llama_folder):
    folder = tmp_path_factory.mktemp("cli") / "model"
    done = mbdist("convert", llama_folder, folder, "--planes", 3, "--init", "joint")
    return folder, done


@pytest.mark.parametrize(
    "verb",
    [
        "convert",
        "train",
        "eval",
        "generate",
        "launch local",
        "config schema",
        "config check",
        "env",
        "bench train",
        "bench quality",
        "bench comm",
        "bench codecs",
        "bench teachers",
        "bench checkpoint",
        "bench levers",
        "bench faults",
        "bench scaling",
        "bench convert",
        "plan",
    ],
)
def test_help_has_an_example(verb):
    assert f"mbdist {verb}" in mbdist(*verb.split(), "--help").stdout.split("Example:")[1] or verb == "train"


def test_convert_prints_errors_and_bits(converted):
    output = converted[1].stdout
    assert "14 layers" in output and "bits a weight" in output and "mean relative error" in output
    assert (converted[0] / "tokenizer.json").exists()


def test_eval_prints_json_that_agrees_with_transformers(converted, tmp_path, llama_folder, tokenizer):
    text = tmp_path / "text.txt"
    text.write_text("The value of a name is an object. " * 60)
    options = ["--text", text, "--window", 32, "--batch", 3, "--precision", "fp32", "--max-windows", 7]
    for folder in (converted[0], llama_folder):
        found = json.loads(mbdist("eval", folder, *options).stdout)
        ids = torch.tensor(tokenizer(text.read_text())["input_ids"][: 7 * 32]).view(7, 32)
        with torch.no_grad():
            loss = load_model(ModelConfig(path=str(folder)))(ids, labels=ids).loss
        assert found["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)
        assert ("bits_per_weight" in found) == (folder == converted[0])


def test_eval_against_a_teacher_and_on_published_windows(converted, tmp_path, llama_folder):
    text = tmp_path / "wiki.test.raw"
    text.write_text(" \n = Name = \n \n The value of a name is an object . \n" * 30)
    options = ["--text", text, "--window", 32, "--precision", "fp32", "--max-windows", 6]
    found = json.loads(mbdist("eval", converted[0], *options, "--teacher", llama_folder).stdout)
    assert found["kl"] > 0 and 0 <= found["top1_agreement"] <= 1
    same = json.loads(mbdist("eval", llama_folder, *options, "--teacher", llama_folder).stdout)
    assert same["kl"] == pytest.approx(0, abs=1e-6) and same["top1_agreement"] == 1
    published = json.loads(mbdist("eval", llama_folder, *options, "--preparation", "wikitext2").stdout)
    assert published["preparation"] == "wikitext2" and published["perplexity"] != same["perplexity"]
    records = tmp_path / "c4-validation.json.gz"
    with gzip.open(records, "wt") as file:
        file.writelines(json.dumps({"text": f"The value of name {n} is an object. " * 9}) + "\n" for n in range(3))
    of_records = ["eval", llama_folder, "--text", records, *options[2:], "--preparation", "c4"]
    assert json.loads(mbdist(*of_records).stdout)["windows"] == 6


def test_eval_of_a_zero_shot_task_from_local_files(converted, tmp_path):
    """lm-eval through the real package: a multiple-choice task of our own, read from a local file."""
    records = [{"q": f"The value of {n} is", "a": [" an object", " xq zz"], "gold": 0} for n in range(4)]
    (tmp_path / "records.json").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "names.yaml").write_text(
        f"task: names\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/records.json}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: a\ndoc_to_target: gold\n"
        "metric_list: [{metric: acc}]\n"
    )
    done = mbdist("eval", converted[0], "--tasks", "names", "--task-folder", tmp_path)
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 <= found["tasks"]["names"]["acc"] <= 1 and found["bits_per_weight"] > 3
    unknown = mbdist("eval", converted[0], "--tasks", "no_such_task", "--task-folder", tmp_path, check=False)
    assert "knows no task no_such_task" in unknown.stderr


def test_convert_to_a_budget_of_bits(tmp_path, llama_folder):
    done = mbdist("convert", llama_folder, tmp_path / "model", "--bits", 4.5, "--python-docs", "--window", 32,
                  "--calibration-tokens", 64)  # fmt: skip
    assert "bits a weight" in done.stdout
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert len(set(config["quantization_config"]["planes"].values())) > 1


def test_generate(converted):
    output = mbdist("generate", converted[0], "--prompt", "The value", "--max-new-tokens", 4).stdout
    assert output.startswith("The value") and len(output.strip()) > len("The value")
    mbdist("generate", converted[0], "--prompt", "Hi", "--chat", "--temperature", 0.8, "--max-new-tokens", 4)


def test_env_and_schema_are_json():
    assert json.loads(mbdist("env").stdout)["versions"]["deepspeed"]
    assert "properties" in json.loads(mbdist("config", "schema").stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "nowhere", "out", "--init", "joint"], "cannot load the model nowhere"),
        (["convert", "package:no_such_package", "out", "--python-docs"], "no Python package no_such_package"),
        (["convert", "{model}", "out", "--init", "joint", "--include", "x"], "no linear layer is left"),
        (["convert", "{model}", "out", "--init", "magic"], "there is calibrated, joint, svid"),
        (["convert", "{model}", "out"], "name it with --text FILE, or --python-docs"),
        (["convert", "{model}", "out", "--init", "joint", "--python-docs"], "--init joint takes none here"),
        (["convert", "{model}", "out", "--bits", "3", "--planes", "2"], "exclude each other"),
        (["convert", "{model}", "out", "--init", "svid", "--bits", "3"], "--allocation residual takes none"),
        (["convert", "{model}", "out", "--text", "a.txt", "--python-docs"], "--text and --python-docs exclude"),
        (["convert", "{model}", "out", "--bits", "0", "--python-docs"], "greater than or equal to 1"),
        (["convert", "{model}", "out", "--bits", "1.1", "--python-docs"], "1.1 bits a weight are too few"),
        (["convert", "{model}", "out", "--bits", "20", "--python-docs"], "raise max_planes or lower bits"),
        (["convert", "{converted}", "out", "--init", "joint"], "is multi-Boolean already"),
        (["convert", "{model}", "{model}", "--init", "joint"], "is not an empty folder"),
        (["convert", "{model}", "out", "--planes", "99"], "less than or equal to 8"),
        (["eval", "{model}"], "name what to measure on"),
        (["eval", "{model}", "--window", "32", "--text", "none.txt"], "no file matches"),
        (["eval", "{model}", "--python-docs", "--window", "4096"], "longer than the model's context"),
        (["eval", "{model}", "--python-docs", "--device", "tpu"], "there is auto, cpu, cuda"),
        (["eval", "{model}", "--python-docs", "--tasks", "piqa"], "name what to measure on"),
        (["eval", "{model}", "--python-docs", "--preparation", "ptb"], "there is packed, wikitext2, c4"),
        (["eval", "{model}", "--text", "a.json.gz", "--text", "b.txt"], "several kinds (json, text)"),
        (
            ["bench", "quality", "--group", "x"],
            "there is start, finetuned, adapted, allocation, architecture, conversion, ablation",
        ),
        (["bench", "comm", "--codec", "x"], "there is fp32, bf16, int8, int4, sign, sign_unbiased"),
        (["bench", "scaling", "--ranks", "9"], "no multiple of --node-size 8"),
        (["generate", "nowhere", "--prompt", "x"], "cannot load the model nowhere"),
        (["train", "none.yaml"], "cannot read the config none.yaml"),
        (["launch", "local", "none.yaml"], "cannot read the config none.yaml"),
        (["config", "check", "none.yaml"], "cannot read the config none.yaml"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(tmp_path, llama_folder, converted, arguments, message):
    places = {"model": llama_folder, "converted": converted[0]}
    done = mbdist(*[argument.format(**places) for argument in arguments], check=False, cwd=tmp_path)
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_train_in_one_process_names_the_ways_to_start_several(tmp_path, llama_folder):
    import yaml

    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(models.run_settings(tmp_path / "run", llama_folder, cluster={"workers": 2})))
    message = mbdist("train", path, check=False).stderr
    assert "mbdist launch local" in message and "torchrun --nproc-per-node 2" in message


def test_a_full_disk_leaves_the_previous_save_whole(tmp_path, llama_folder):
    """A real full disk: a file size limit makes the kernel refuse the write of the weights."""
    target = tmp_path / "model"
    mbdist("convert", llama_folder, target, "--init", "joint")
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "import mbdist; from pathlib import Path;"
        "from mbdist.config.model import ModelConfig; from mbdist.model.loading import load_model;"
        "from mbdist.model.saving import save_model; from mbdist.errors import UserError;"
        f"model = load_model(ModelConfig(path={str(target)!r}));"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));\n"
        f"try: save_model(model, None, Path({str(target)!r}))\n"
        "except UserError as error: print(error); sys.exit(2)"
    )
    import sys

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "cannot save to" in done.stdout and "previous save is unharmed" in done.stdout
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
