"""What was learned.

evaluate          `dpo-fast eval`: a model and its reference, on pairs (pair_figures) and on answers (answer_figures);
                  eval_tables shows both
inspection        `dpo-fast inspect`: rows token by token; inspection_view and token_views show them
run_report        `dpo-fast report`: a page on a run, with plots
score             `dpo-fast score`: log-probs per pair and per token
pages, intervals  what these share
"""
