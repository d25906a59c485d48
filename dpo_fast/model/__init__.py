"""A causal language model that reads packs.

load       models and tokenizers by name
placement  device and dtypes
attention  packs in transformers' attention interface
checkpointing  which activations are recomputed
policy     log-probs of a pack
scorer     the protocol of everything that gives log-probs of a pack
check      whether packs give the model's own log-probs
"""
