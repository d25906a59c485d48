"""A causal language model that reads packs.

load       models and tokenizers by name
adapter    low-rank adapters of peft: a new one, one that was read, one that is written
adapter_folder  what a folder of an adapter holds
adapter_join  two adapters as one
quantize   weights in 4 bits
placement  device and dtypes
attention  packs in transformers' attention interface
checkpointing  which activations are recomputed
policy     log-probs of a pack
scorer     the protocol of everything that gives log-probs of a pack
check      whether packs give the model's own log-probs
"""
