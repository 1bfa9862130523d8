#!/usr/bin/env bash
# transformers 5.24.0: AutoTokenizer takes every tokenizer beside a Qwen 2 model for Qwen's own, and finds no tokens.
#
# The file names its class, TokenizersBackend (PreTrainedTokenizerFast), as save_pretrained of the same version writes
# it. But "qwen2" is in a list of types whose files are taken to be wrong; Qwen2Tokenizer is made of tokenizer.json's
# vocabulary, as byte-level BPE without merges. A text of known words becomes no token at all; without an error or a
# warning. Beside a LLaMA, or loaded by its class, the same tokenizer is what was saved.
# Expected: AutoTokenizer returns what was saved, or refuses it.
# Why it matters: small models for tests and for research often have Qwen's architecture and another tokenizer; they
# train, or are calibrated, on nothing.
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6
finding <<'PYTHON'
import json
import logging
import warnings
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

records = []
handler = logging.Handler()
handler.emit = records.append
logging.getLogger("transformers").addHandler(handler)
warnings.simplefilter("error")

words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "quick": 2, "fox": 3}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
for model_type in ("llama", "qwen2"):
    folder = Path(model_type)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    named = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    found = AutoTokenizer.from_pretrained(folder)
    ids = found("the quick fox")["input_ids"]
    by_class = PreTrainedTokenizerFast.from_pretrained(folder)("the quick fox")["input_ids"]
    print(f"{model_type}: saved as {named}, loaded as {type(found).__name__}: {ids}; by its class: {by_class}")
    assert by_class == [1, 2, 3] and ids == ([1, 2, 3] if model_type == "llama" else [])
messages = [record.getMessage() for record in records if record.levelno >= logging.WARNING]
print(f"warnings: {len(messages)}")
assert not [message for message in messages if "okeniz" in message], messages
PYTHON

# Output seen:
#   versions: Python 3.11.7, transformers 5.24.0, tokenizers 0.23.3, numpy 2.4.6
#   llama: saved as TokenizersBackend, loaded as TokenizersBackend: [1, 2, 3]; by its class: [1, 2, 3]
#   qwen2: saved as TokenizersBackend, loaded as Qwen2Tokenizer: []; by its class: [1, 2, 3]
#   warnings: 0
