"""From any signal to preference rows: sample answers, label them, pair them. `dpo_fast` has the functions."""
