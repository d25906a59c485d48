"""The reference is data: log-probs of a frozen model, kept by content.

fingerprint  a hash of everything in a model that can move a log-prob
store        the SQLite file
scores       a model's scores in it: looked up, filled, verified
fill         a model through the store: what training reads, and `dpo-fast score`
moving       TR-DPO's reference, which follows the policy
"""
