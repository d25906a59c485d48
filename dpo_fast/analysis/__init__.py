"""What was learned.

evaluate         `dpo-fast eval`: a model beside its reference, on pairs and on answers
inspection       `dpo-fast inspect`: rows token by token; inspection_view and token_views show them
run_report       `dpo-fast report`: a page of a run, with plots
score            `dpo-fast score`: log-probs, per pair and per token
pages, intervals what these share
"""
