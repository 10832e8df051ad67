"""Import models into model directories: GGUF files, pickled PyTorch weights, hub ids, installed packages.

`runner.import_model` does it. `sources` finds what the user named, `gguf_*` read GGUF files, `folder` reads
folders of `pytorch_model.bin` or safetensors, and `plan` writes the result.
"""
