"""Every setting, its default and its meaning, in one place.

Names and defaults are those of TRL's `DPOConfig` and transformers' `TrainingArguments` where the meaning is the same;
README.md lists the few that differ. The command line, YAML files and Python read these classes and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

PairChoice = Literal["best_worst", "adjacent", "all"]
TruncationMode = Literal["keep_start", "keep_end", "drop"]
TrainOn = Literal["assistant", "last_turn", "all"]


@dataclass
class DataConfig:
    """Which rows are read and how they become tokens.

    Attributes:
        data: .jsonl, .jsonl.gz, .json or .parquet file, or a Hub dataset's name (`name:split` for a split).
        prompt_column: column of the prompt. By default `messages`, `conversations`, `question`, `query`,
            `instruction` (with `input`) and `input` are recognised too; an empty name says that the answers hold it.
        chosen_column: column of the preferred answer.
        rejected_column: column of the rejected answer.
        responses_column: column with a list of answers, where rows have no chosen and rejected.
        scores_column: column with one number per response.
        pairs: which responses are compared: `best_worst` the best with the worst, `adjacent` each with the next worse
            one, `all` every two. Each response is computed once, however many pairs it is in.
        min_score_gap: responses whose scores differ by less are not compared; equal scores never are.
        weight_column: column with a number per row, 0 or above, by which its loss is multiplied; null weights none.
        margin_column: column with a number per row, by how much the chosen answer's true score is higher, for the
            losses that use it; rows of responses and scores know it without.
        gold_column: column with a third answer that is better than both, for the losses that use it.
        tools_column: column with the tools that the chat template is given.
        system_column: column with the text of the system turn; null reads none.
        chat_template: file with a Jinja chat template that replaces the tokenizer's.
        chat_template_kwargs: further arguments of the chat template, such as `{"enable_thinking": false}`.
        chat_template_kwargs_column: column with such arguments per row, which win; null reads none.
        apply_chat_template: wrap string rows as one user turn and one assistant turn; null wraps only rows with a
            system turn, tools or template arguments, false none.
        train_on: which tokens of an answer are scored: those of its `assistant` turns, of its `last_turn` only, or
            `all`.
        keep_reasoning: keep the reasoning that the chat template strips from answers: put the answer behind the
            generation prompt as the model would write it.
        max_length: tokens of prompt plus answer that are kept; null keeps all.
        truncation_mode: `keep_start` cuts the end of the answer (TRL's meaning), `keep_end` the start of the
            prompt, `drop` leaves rows that are too long out.
        max_rows: read no more than this many rows.
        strict: stop at the first row that would be dropped.
    """

    data: str = ""
    prompt_column: str = "prompt"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    responses_column: str = "responses"
    scores_column: str = "scores"
    pairs: PairChoice = "best_worst"
    min_score_gap: float = 0.0
    weight_column: str | None = None
    margin_column: str | None = None
    gold_column: str | None = None
    tools_column: str = "tools"
    system_column: str | None = "system"
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template_kwargs_column: str | None = "chat_template_kwargs"
    apply_chat_template: bool | None = None
    train_on: TrainOn = "assistant"
    keep_reasoning: bool = False
    max_length: int | None = 1024
    truncation_mode: TruncationMode = "keep_start"
    max_rows: int | None = None
    strict: bool = False


@dataclass
class ModelConfig:
    """Which model runs, where and in which numbers.

    Attributes:
        model: checkpoint folder, Hub name or .gguf file.
        device: `auto` is CUDA where there is a GPU, else the CPU.
        dtype: of the weights; `auto` is float32.
        bf16: run the forward and backward in bfloat16 autocast; null is true on a GPU, false on a CPU.
        max_tokens_per_batch: token budget of one pack; null is twice `max_length`, so that any pair fits.
        head_memory_budget_gib: GiB that the LM head may hold for its exponentials.
        autotune: on a GPU, check and time the head's kernels once for each vocabulary and hidden size and keep the
            fastest; false takes the defaults.
        deterministic_attention: on a GPU, let attention's backward add in a fixed order, so that two runs give the same
            bits; false lets it add in any order.
        reference_store: SQLite file of reference log-probs; null is `reference.sqlite` in the user's cache folder.
    """

    model: str = ""
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    bf16: bool | None = None
    max_tokens_per_batch: int | None = None
    head_memory_budget_gib: float = 2.0
    autotune: bool = True
    deterministic_attention: bool = True
    reference_store: str | None = None


@dataclass
class SamplingConfig:
    """How answers are sampled.

    Attributes:
        num_samples: answers of a prompt, shared evenly among all models and temperatures.
        temperature: one or several; 1 is the model's own distribution, 0 takes the likeliest tokens.
        top_p: sample from the likeliest tokens that hold this share of the probability.
        max_new_tokens: length at which an answer is cut.
        generation_batch_size: answers that are written at once.
        backend: `transformers`, or `vllm` where that is installed.
        seed: of the sampling; each batch of prompts has a seed of its own made from it.
    """

    num_samples: int = 8
    temperature: float | list[float] = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    generation_batch_size: int = 64
    backend: Literal["transformers", "vllm"] = "transformers"
    seed: int = 42


@dataclass
class SampleConfig(SamplingConfig):
    """Settings of `dpo-fast sample`: those of `SamplingConfig` and the following.

    Attributes:
        model: checkpoint folder, Hub name or .gguf file, or a list of them.
        data: rows with a prompt, in any file or dataset that `dpo-fast train` reads; other columns are kept.
        out: .jsonl file to write, one row a prompt.
        prompt_column: column of the prompt, a string or messages.
        tools_column: column with the tools that the chat template is given.
        chat_template: file with a Jinja chat template that replaces the tokenizer's.
        apply_chat_template: make a prompt that is a string one user turn; null does so where the tokenizer has a chat
            template. The rows written hold the turns, so that training needs no such option.
        max_rows: read no more than this many rows.
        device: `auto` is CUDA where there is a GPU, else the CPU.
        dtype: of the weights; `auto` is bfloat16 on a GPU, float32 on a CPU.
        overwrite: replace `out`, and what an interrupted run with other settings left behind.
    """

    model: str | list[str] = ""
    data: str = ""
    out: str = ""
    prompt_column: str = "prompt"
    tools_column: str = "tools"
    chat_template: str | None = None
    apply_chat_template: bool | None = None
    max_rows: int | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    overwrite: bool = False


@dataclass
class SignalConfig:
    """Which signals judge an answer, and what a checker may use up.

    Attributes:
        signals: name of a signal (`json`, `regex:PATTERN`, `number:COLUMN`, ...; docs/curate.md lists them), or a list.
        signal_weights: one factor for each of them, their sum is the score; null is 1 for all.
        allow_commands: let `command:...` run programs.
        timeout: seconds that a signal may take for one answer.
        memory_limit_mib: memory of a command.
        file_limit_mib: files that a command may write, all together.
        output_limit_kib: what a command may print.
        process_limit: processes that a command may run at once.
        num_workers: answers judged at once; null is one for each processor.
        judge_batch_size: texts that a reward model or judge reads at once.
    """

    signals: str | list[str] = ""
    signal_weights: list[float] | None = None
    allow_commands: bool = False
    timeout: float = 10.0
    memory_limit_mib: int = 1024
    file_limit_mib: int = 64
    output_limit_kib: int = 1024
    process_limit: int = 64
    num_workers: int | None = None
    judge_batch_size: int = 16


@dataclass
class LabelConfig(SignalConfig):
    """Settings of `dpo-fast label`: those of `SignalConfig` and the following.

    Attributes:
        data: rows with `prompt` and `responses`, as `dpo-fast sample` writes them.
        out: .jsonl file to write: the same rows with `scores`, `signals` and `signal_errors`.
        prompt_column: column of the prompt.
        responses_column: column with the list of answers.
        max_rows: read no more than this many rows.
        device: of reward models and judges; `auto` is CUDA where there is a GPU, else the CPU.
        by_hand: let a person judge, on a page that only this machine can open.
        terminal: let a person judge in the terminal.
        port: of the page; 0 takes a free one.
        pairs: which answers of a prompt a person compares.
        repeat_share: share of the comparisons that are shown twice, to measure how well a person agrees with
            themselves.
        seed: of the order of comparisons and of their sides.
        overwrite: replace `out`, and what an interrupted run with other settings left behind.
    """

    data: str = ""
    out: str = ""
    prompt_column: str = "prompt"
    responses_column: str = "responses"
    max_rows: int | None = None
    device: str = "auto"
    by_hand: bool = False
    terminal: bool = False
    port: int = 0
    pairs: Literal["first_two", "adjacent", "all"] = "first_two"
    repeat_share: float = 0.1
    seed: int = 42
    overwrite: bool = False


@dataclass
class PairConfig:
    """Settings of `dpo-fast pair`.

    Attributes:
        data: rows with `prompt`, `responses` and `scores`, as `dpo-fast label` writes them.
        out: .jsonl file to write, one row a pair: what `dpo-fast train --data` reads.
        eval_out: .jsonl file of the prompts that are held out, where `eval_split` is above 0.
        eval_split: share of the prompts that is held out; all pairs of a prompt are on one side.
        prompt_column: column of the prompt.
        responses_column: column with the list of answers.
        scores_column: column with one number per answer; answers without one (null) are left out.
        pairs: `best_worst` the best answer with the worst, `adjacent` each with the next worse one, `all` every two.
        min_score_gap: answers whose scores differ by less are not compared; equal scores never are.
        pairs_per_prompt: keep so many pairs of a prompt, those with the widest gaps; null keeps all.
        truncated: answers that were cut at `max_new_tokens`: `never_chosen` uses them as the worse one alone, `drop`
            leaves them out, `keep` treats them as any other.
        balance_length: among equally good pairs take the one whose answers are nearest in length, then leave pairs out
            until the chosen answer is as often the longer as the shorter one.
        max_rows: read no more than this many rows.
        seed: of the split, and of what is left out.
        overwrite: replace `out` and `eval_out`.
    """

    data: str = ""
    out: str = ""
    eval_out: str | None = None
    eval_split: float = 0.0
    prompt_column: str = "prompt"
    responses_column: str = "responses"
    scores_column: str = "scores"
    pairs: PairChoice = "best_worst"
    min_score_gap: float = 0.0
    pairs_per_prompt: int | None = None
    truncated: Literal["never_chosen", "drop", "keep"] = "never_chosen"
    balance_length: bool = False
    max_rows: int | None = None
    seed: int = 42
    overwrite: bool = False


@dataclass
class DemoConfig:
    """Settings of `dpo-fast demo`.

    Attributes:
        out: folder of what the demo makes.
        quick: a smaller run, under a minute.
        seed: of everything random.
    """

    out: str = "demo"
    quick: bool = False
    seed: int = 0


@dataclass
class ScoreConfig(ModelConfig, DataConfig):
    """Settings of `dpo-fast score`: those of `DataConfig` and `ModelConfig`, and the following.

    Attributes:
        out: file to write, one JSON object a pair.
        tokens: also write the log-prob of each token.
    """

    out: str = ""
    tokens: bool = False


@dataclass
class EvalConfig(SamplingConfig, SignalConfig, ModelConfig, DataConfig):
    """Settings of `dpo-fast eval`: those of the configurations above, and the following.

    Attributes:
        reference: the model that `model` is compared with.
        beta: factor of the implicit reward.
        prompts: file or dataset of prompts that both models answer, judged by `signals`; null compares no answers.
        plain_prompts: give prompts that are strings to the models as they are, without the chat template.
        out: .json file to write; the answers go beside it, into a file that ends in `.answers.jsonl`.
    """

    reference: str = ""
    beta: float = 0.1
    prompts: str | None = None
    plain_prompts: bool = False
    out: str | None = None


@dataclass
class InspectConfig(ModelConfig, DataConfig):
    """Settings of `dpo-fast inspect`: those of `DataConfig` and `ModelConfig`, and the following.

    Attributes:
        reference: the model that `model` is compared with; without one the rows are shown as they are trained on.
        rows: numbers of the rows to show, counted from 0, such as `0-20` or `[0, 5]`; null shows the first few.
        beta: factor of the implicit reward.
        out: .html file to write; null shows the terminal's view alone.
    """

    reference: str = ""
    rows: list[int] | str | None = None
    beta: float = 0.1
    out: str | None = None


@dataclass
class ReportConfig:
    """Settings of `dpo-fast report`.

    Attributes:
        run: folder of a training run.
        out: .html file to write; null is `report.html` in that folder.
    """

    run: str = ""
    out: str | None = None


@dataclass
class LossConfig:
    """Which loss is trained with.

    Attributes:
        loss_type: name of a preference loss (`dpo_fast.losses.LOSSES`), `module:function` for one of your own, or a
            list of names whose losses are added up.
        loss_weights: one weight for each of them; null is 1 for all.
        beta: strength of the pull towards the reference.
        label_smoothing: probability that a label is flipped, for the losses that use it.
        f_divergence_type: what holds the policy near the reference: `reverse_kl` (DPO's), `forward_kl`, `js_divergence`
            or `alpha_divergence`.
        f_alpha_divergence_coef: alpha of `alpha_divergence`.
        discopop_tau: temperature of the modulation in `discopop`.
        dpop_lambda: weight of the penalty in `dpop`.
        simpo_gamma: margin that `simpo` and `alphapo` ask for, after beta.
        alphapo_alpha: shape of the reward in `alphapo`; 0 is SimPO.
        tpo_alpha: weight of the gold answer's term in `tpo`.
        score_scale: factor of the rows' score gaps in `odpo` and `rpo`.
        desirable_weight: weight of chosen answers in `kto`.
        undesirable_weight: weight of rejected answers in `kto`.
        ld_alpha: LD-DPO: the longer answer's tokens beyond the shorter one's length count by this factor; null is 1.
        use_weighting: WPO: weight each pair by how likely the policy finds its answers.
    """

    loss_type: str | list[str] = "sigmoid"
    loss_weights: list[float] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    dpop_lambda: float = 50.0
    simpo_gamma: float = 0.5
    alphapo_alpha: float = 0.25
    tpo_alpha: float = 1.0
    score_scale: float = 1.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    ld_alpha: float | None = None
    use_weighting: bool = False


@dataclass
class DPOConfig(LossConfig, ModelConfig, DataConfig):
    """Settings of a training run: those of `DataConfig`, `ModelConfig` and `LossConfig`, and the following.

    Attributes:
        output_dir: folder of the run.
        ref_model: the reference, where it is not the model that training starts from.
        sync_ref_model: TR-DPO: let the reference follow the policy; it is then kept as a second model and scores every
            pack anew.
        ref_model_sync_steps: optimizer steps from one such move to the next.
        ref_model_mixup_alpha: share of the policy in the new reference, the rest is the old one.
        eval_data: held-out rows, in any of the forms of `data`.
        eval_split: share of `data` that is held out where `eval_data` is not given.
        eval_steps: evaluate every so many optimizer steps; null evaluates at the end alone.
        learning_rate: peak learning rate.
        lr_scheduler_type: a schedule of transformers (`linear`, `cosine`, `constant_with_warmup`, ...).
        warmup_steps: steps of warm-up; below 1, a share of all steps.
        optim: `adamw_torch`, or `adamw_8bit` through bitsandbytes.
        adam_beta1: Adam's first decay.
        adam_beta2: Adam's second decay.
        adam_epsilon: Adam's epsilon.
        weight_decay: on matrices; biases and norms have none.
        max_grad_norm: norm to which the gradient is clipped; 0 does not clip.
        per_device_train_batch_size: rows of one micro-batch, each a pair or more (`pairs`).
        gradient_accumulation_steps: micro-batches of one optimizer step; the loss is the mean over all its pairs.
        num_train_epochs: passes over the rows, where `max_steps` is not given.
        max_steps: optimizer steps; -1 follows `num_train_epochs`.
        torch_compile: compile the decoder's layers, once for packs of all sizes; needs a C++ compiler on a CPU.
        static_shapes: fill every pack up to `max_tokens_per_batch`, so that compiled layers see one size alone.
        gradient_checkpointing: recompute the activations of each layer in the backward.
        activation_checkpointing: transformers' newer name of `gradient_checkpointing`; if given, it counts.
        logging_steps: write metrics every so many steps.
        save_steps: write a checkpoint every so many steps; 0 writes none but the final model.
        save_total_limit: checkpoints kept; null keeps all.
        resume: `auto` goes on from the newest whole checkpoint in `output_dir`, a folder from that one.
        overwrite: start anew in an `output_dir` that holds a run.
        seed: of the order of rows and of dropout.
        dry_run: read the data, show the report and the plan, then stop.
    """

    output_dir: str = "runs/dpo"
    ref_model: str | None = None
    sync_ref_model: bool = False
    ref_model_sync_steps: int = 512
    ref_model_mixup_alpha: float = 0.6
    eval_data: str | None = None
    eval_split: float = 0.0
    eval_steps: int | None = None
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0
    optim: Literal["adamw_torch", "adamw_8bit"] = "adamw_torch"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 3.0
    max_steps: int = -1
    torch_compile: bool = False
    static_shapes: bool = False
    gradient_checkpointing: bool = False
    activation_checkpointing: bool | None = None
    logging_steps: int = 10
    save_steps: int = 500
    save_total_limit: int | None = None
    resume: str | None = None
    overwrite: bool = False
    seed: int = 42
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Settle on one name, so that the settings that are written hold one value."""
        if self.activation_checkpointing is not None:
            self.gradient_checkpointing, self.activation_checkpointing = self.activation_checkpointing, None
