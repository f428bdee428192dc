"""Hugging Face interoperability: import a model from elsewhere, export one of ours, and push either to the Hub.

Read in this order:

- `load.py` finds a model by name or path and returns a `ModelSource` (`model_source.py`); `hugging_face_folder.py` and
  `weights_file.py` are the two foreign formats, `weights.py` reads their files, `inferred.py` what old files do not state.
- `families.py` is the table of the supported `transformers` architectures, built from `architecture_options.py`,
  `config_keys.py` and `layouts.py`. `config_json.py` converts configs by it, `tensors.py` converts tensors.
- `from_checkpoint.py` initialises a run from a `ModelSource`.
- `export.py` writes a folder for `transformers`: with `tokenizer_files.py`, `sentencepiece_json.py` and `model_card.py`.
- `model_tokenizer.py` and `special_tokens.py` find the tokenizer of an imported model, and its tokens around a text.
- `hub.py` and `upload.py` talk to the Hub. `command.py` is the command-line interface of `export` and `import`.
"""
