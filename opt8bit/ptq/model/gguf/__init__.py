"""Files for llama.cpp: blocks of codes, names of tensors, reading."""
