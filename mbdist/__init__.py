"""mbdist: distributed finetuning of multi-Boolean language models.

``import mbdist`` makes transformers able to load a multi-Boolean model folder with ``from_pretrained``. Nothing
heavy is imported before transformers itself is: validating a config or submitting a job works where torch is slow to
load.
"""

import wrapt

__version__ = "0.1.0"


@wrapt.when_imported("transformers.quantizers.auto")
def _register_with_transformers(_module):
    import mbdist.model.quantizer  # noqa: F401  (its decorators register)
