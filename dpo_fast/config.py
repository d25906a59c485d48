"""Every setting, its default and its meaning, in one place.

If the meaning is the same, names and defaults are those of TRL's `DPOConfig` and transformers' `TrainingArguments`;
README.md lists the few defaults that differ. The command line, YAML files and Python all read these classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from dpo_fast.errors import UserError
from dpo_fast.ranges import Settings, number

PairChoice = Literal["best_worst", "adjacent", "all"]
TruncationMode = Literal["keep_start", "keep_end", "drop"]
TrainOn = Literal["assistant", "last_turn", "all"]


@dataclass
class DataConfig(Settings):
    """Which rows are read and how they become tokens.

    Attributes:
        data: .jsonl, .jsonl.gz, .json or .parquet file, or a Hub dataset (`name` or `name:split`).
        prompt_column: column of the prompt. By default `messages`, `conversations`, `question`, `query`,
            `instruction` (with `input`) and `input` are recognised too; an empty name says that the answers hold it.
        chosen_column: column of the preferred answer.
        rejected_column: column of the rejected answer.
        responses_column: column with a list of answers, for rows without chosen and rejected.
        scores_column: column with a list of scores, one per response.
        pairs: which responses to compare: `best_worst` the best with the worst, `adjacent` each with the next worse
            one, `all` every two. Each response is computed once, however many pairs it is in.
        min_score_gap: do not compare responses whose scores differ by less; equal scores are never compared.
        weight_column: column with a weight per row, 0 or above, that multiplies its loss; null weights all rows by 1.
        margin_column: column with the true score of the chosen answer minus that of the rejected one, for losses that
            use it; rows with responses and scores do not need it.
        gold_column: column with a third answer that is better than both, for losses that use it.
        tools_column: column with the tools to pass to the chat template.
        system_column: column with the text of the system turn; null reads none.
        chat_template: file with a Jinja chat template that replaces the tokenizer's.
        chat_template_kwargs: further arguments of the chat template, such as `{"enable_thinking": false}`.
        chat_template_kwargs_column: column with such arguments per row, which win; null reads none.
        apply_chat_template: wrap plain-text rows as one user turn and one assistant turn; null wraps only rows with a
            system turn, tools or template arguments, false none.
        train_on: which tokens of an answer are scored: those of its `assistant` turns, of its `last_turn` only, or
            `all`.
        keep_reasoning: keep the reasoning that the chat template strips from answers: put the answer after the
            generation prompt, as the model would write it.
        max_length: maximum tokens of prompt plus answer; null for no limit.
        truncation_mode: `keep_start` cuts the end of the answer (as in TRL), `keep_end` cuts the start of the prompt,
            `drop` drops rows that are too long.
        max_rows: read at most this many rows; null reads all.
        strict: stop at the first row that would be dropped.
    """

    data: str = ""
    prompt_column: str = "prompt"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    responses_column: str = "responses"
    scores_column: str = "scores"
    pairs: PairChoice = "best_worst"
    min_score_gap: float = number(0.0, least=0)
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
    max_length: int | None = number(1024, above=0)
    truncation_mode: TruncationMode = "keep_start"
    max_rows: int | None = number(None, above=0)
    strict: bool = False


@dataclass
class ModelConfig(Settings):
    """Which model to run, on which device, in which precision.

    Attributes:
        model: checkpoint folder, Hub name, .gguf file or adapter's folder.
        adapter: folder of an adapter (peft's format) to use on `model`; the same as that folder as `model` with `model`
            as `adapter_base`.
        adapter_base: model beneath the adapter that `model` names; null is the one that its configuration names.
        load_in_4bit: quantise the weights to 4 bits while loading (bitsandbytes' NF4, double quantisation).
        device: `auto` is CUDA if there is a GPU, otherwise the CPU.
        dtype: dtype of the weights; `auto` is float32, or bfloat16 for the frozen weights under an adapter on a GPU.
        bf16: run forward and backward under bfloat16 autocast; null is true on a GPU, false on a CPU.
        max_tokens_per_batch: token budget of one pack; null is 2,048 on a CPU and 8,192 on a GPU (128 per GiB of its
            memory if that is less), or the longest row, but no more than `per_device_train_batch_size` pairs of full
            length take. It changes speed and memory, not losses or gradients.
        head_memory_budget_gib: GiB of exponentials that the LM head may keep for the backward.
        autotune: on a GPU, check and time the head's kernels once per vocabulary and hidden size and use the fastest;
            false uses the defaults.
        deterministic_attention: on a GPU, sum in a fixed order in attention's backward, so that runs are bit-identical;
            false allows any order.
        fused_layers: on a GPU, compute norms, rotary embeddings and gated MLPs by Liger's kernels; `auto` does so where
            liger-kernel is installed, knows the model and gives its log-probs, and leaves it to `torch_compile` if that
            is on; true refuses to run without.
        reference_store: SQLite file with reference log-probs; null is `reference.sqlite` in the user's cache folder.
        trust_remote_code: run code that comes with a model; false refuses such models, and asks nothing.
    """

    model: str = ""
    adapter: str | None = None
    adapter_base: str | None = None
    load_in_4bit: bool = False
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    bf16: bool | None = None
    max_tokens_per_batch: int | None = number(None, above=0)
    head_memory_budget_gib: float = number(2.0, least=0)
    autotune: bool = True
    deterministic_attention: bool = True
    fused_layers: bool | Literal["auto"] = "auto"
    reference_store: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Fold the two ways to name an adapter into one, so that saved settings hold one value."""
        super().__post_init__()
        if self.adapter is not None:
            self.model, self.adapter_base, self.adapter = self.adapter, self.adapter_base or self.model or None, None


@dataclass
class ServerConfig(Settings):
    """How to reach OpenAI-compatible servers; see docs/engines.md.

    Attributes:
        base_url: address of a server, such as `http://localhost:8000/v1`, or a list of servers that share the work.
        api_key_env: environment variable that holds the API key.
        concurrency: requests in flight at once, on all servers together.
        max_requests_per_minute: upper limit on requests, retries included; null sets none.
        max_retries: times that a request is repeated after a failure before the command stops.
        request_timeout: seconds to wait for an answer.
        request_options: further fields of every request, such as `{top_k: 20}`; a null removes a field.
    """

    base_url: str | list[str] = ""
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = number(32, above=0)
    max_requests_per_minute: float | None = number(None, above=0, most=1e9)
    max_retries: int = number(6, least=0)
    request_timeout: float = number(600.0, above=0, most=1e6)
    request_options: dict[str, Any] | None = None


@dataclass
class SamplingConfig(ServerConfig):
    """How to sample answers: the settings of `ServerConfig`, plus the following.

    Attributes:
        num_samples: answers per prompt, split evenly among all models and temperatures.
        temperature: one or a list; 1 is the model's own distribution, 0 is greedy.
        top_p: sample from the most likely tokens that make up this share of the probability.
        max_new_tokens: maximum tokens of an answer.
        generation_batch_size: answers to generate at once.
        backend: `transformers`; `vllm` if it is installed; `openai` for a server at `base_url`.
        trust_remote_code: run code that comes with a model; false refuses such models, and asks nothing.
        seed: random seed for sampling; each batch of prompts derives its own seed from it.
    """

    num_samples: int = number(8, above=0)
    temperature: float | list[float] = number(1.0, least=0)
    top_p: float = number(1.0, above=0, most=1)
    max_new_tokens: int = number(256, above=0)
    generation_batch_size: int = number(64, above=0)
    backend: Literal["transformers", "vllm", "openai"] = "transformers"
    trust_remote_code: bool = False
    seed: int = number(42, least=0, most=2**32 - 1)


@dataclass
class SampleConfig(SamplingConfig):
    """Settings of `dpo-fast sample`: those of `SamplingConfig`, plus the following.

    Attributes:
        model: checkpoint folder, Hub name, .gguf file, adapter's folder or the name on a server, or a list of them.
        adapter: folder of an adapter to use on `model`, as for `dpo-fast train`.
        adapter_base: model beneath adapters that `model` names; null is the one that their configuration names.
        load_in_4bit: quantise the weights to 4 bits while loading.
        data: rows with a prompt, in any file or dataset that `dpo-fast train` reads; other columns are kept.
        out: .jsonl file to write, one row per prompt.
        prompt_column: column of the prompt, a string or messages.
        tools_column: column with the tools to pass to the chat template.
        system_column: column with the text of the system turn, which becomes part of the prompt; null reads none.
        chat_template: file with a Jinja chat template that replaces the tokenizer's.
        chat_template_kwargs: further arguments of the chat template, such as `{"enable_thinking": false}`.
        chat_template_kwargs_column: column with such arguments per row, which win; null reads none.
        apply_chat_template: turn a string prompt into one user turn; null does so if the tokenizer has a chat template.
            The output rows contain the turns, so training does not need this option.
        max_rows: read at most this many rows; null reads all.
        device: `auto` is CUDA if there is a GPU, otherwise the CPU.
        dtype: dtype of the weights; `auto` is bfloat16 on a GPU, float32 on a CPU.
        overwrite: replace `out` and the leftovers of an interrupted run with other settings.
        dry_run: with `backend` `openai`, print the number of requests and tokens, then stop.
    """

    model: str | list[str] = ""
    adapter: str | None = None
    adapter_base: str | None = None
    load_in_4bit: bool = False
    data: str = ""
    out: str = ""
    prompt_column: str = "prompt"
    tools_column: str = "tools"
    system_column: str | None = "system"
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template_kwargs_column: str | None = "chat_template_kwargs"
    apply_chat_template: bool | None = None
    max_rows: int | None = number(None, above=0)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    overwrite: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        """As for `ModelConfig`."""
        super().__post_init__()
        if self.adapter is not None:
            if isinstance(self.model, list):
                raise UserError("--adapter: expected one --model beneath it; or name adapters' folders as --model")
            self.model, self.adapter_base, self.adapter = self.adapter, self.adapter_base or self.model or None, None


@dataclass
class SignalConfig(ServerConfig):
    """Which signals judge an answer, the limits of a checker, and the settings of `ServerConfig`.

    Attributes:
        signals: name of a signal (`json`, `regex:PATTERN`, `number:COLUMN`, ...; see docs/signals.md), or a list.
        signal_weights: one weight per signal; the score is the weighted sum; null weights all by 1.
        allow_commands: allow `command:...` to run programs.
        timeout: time limit per answer of a signal, in seconds.
        memory_limit_mib: memory limit of a command, in MiB.
        file_limit_mib: total size of the files that a command may write, in MiB.
        output_limit_kib: how much a command may print, in KiB.
        process_limit: number of processes that a command may run at once.
        num_workers: answers to judge at once; null is one per processor.
        judge_batch_size: texts per batch of a reward model or judge.
        judge_base_url: address of the server of `judge:openai:NAME` and `reward-model:openai:NAME`, or a list; null is
            `base_url`.
        judge_api_key_env: environment variable that holds its API key; null is `api_key_env`.
        judge_question: what a judge is asked, with `{prompt}`, `{first}` and `{second}`; null asks for the better
            answer, A or B.
        judge_max_tokens: maximum tokens of a served judge's reply.
        trust_remote_code: run code that comes with a model; false refuses such models, and asks nothing.
    """

    signals: str | list[str] = ""
    signal_weights: list[float] | None = None
    allow_commands: bool = False
    timeout: float = number(10.0, above=0, most=1e6)
    memory_limit_mib: int = number(1024, above=0)
    file_limit_mib: int = number(64, above=0)
    output_limit_kib: int = number(1024, above=0)
    process_limit: int = number(64, above=0)
    num_workers: int | None = number(None, least=1, most=1024)
    judge_batch_size: int = number(16, above=0)
    judge_base_url: str | list[str] | None = None
    judge_api_key_env: str | None = None
    judge_question: str | None = None
    judge_max_tokens: int = number(16, above=0)
    trust_remote_code: bool = False


@dataclass
class LabelConfig(SignalConfig):
    """Settings of `dpo-fast label`: those of `SignalConfig`, plus the following.

    Attributes:
        data: rows with `prompt` and `responses`, as `dpo-fast sample` writes them.
        out: .jsonl file to write: the same rows with `scores`, `signals` and `signal_errors`.
        prompt_column: column of the prompt.
        responses_column: column with the list of answers.
        system_column: column with the text of the system turn, which is shown by hand; null reads none.
        max_rows: read at most this many rows; null reads all.
        device: where reward models and judges run; `auto` is CUDA if there is a GPU, otherwise the CPU.
        by_hand: judge by hand, on a web page that only this machine can open.
        terminal: judge by hand, in the terminal.
        port: port of the page; 0 picks a free one.
        pairs: which answers of a prompt to compare by hand.
        repeat_share: share of comparisons shown twice, to measure how well judges agree with themselves.
        seed: random seed for order, sides and repeats of comparisons.
        overwrite: replace `out` and the leftovers of an interrupted run with other settings.
        dry_run: print how many requests and tokens the signals on servers take, then stop.
    """

    data: str = ""
    out: str = ""
    prompt_column: str = "prompt"
    responses_column: str = "responses"
    system_column: str | None = "system"
    max_rows: int | None = number(None, above=0)
    device: str = "auto"
    by_hand: bool = False
    terminal: bool = False
    port: int = number(0, least=0, most=65535)
    pairs: Literal["first_two", "adjacent", "all"] = "first_two"
    repeat_share: float = number(0.1, least=0, most=1)
    seed: int = number(42, least=0, most=2**32 - 1)
    overwrite: bool = False
    dry_run: bool = False


@dataclass
class PairConfig(Settings):
    """Settings of `dpo-fast pair`.

    Attributes:
        data: rows with `prompt`, `responses` and `scores`, as `dpo-fast label` writes them.
        out: .jsonl file to write, one row per pair, for `dpo-fast train --data`.
        eval_out: .jsonl file for the pairs of held-out prompts, if `eval_split` is above 0.
        eval_split: share of prompts to hold out; all pairs of a prompt are on one side.
        prompt_column: column of the prompt.
        responses_column: column with the list of answers.
        scores_column: column with a list of scores, one per answer; answers without a score (null) are left out.
        tools_column: column with the tools for the chat template; like the next two, it is kept.
        system_column: column with the text of the system turn; null keeps none.
        chat_template_kwargs_column: column with arguments of the chat template; null keeps none.
        pairs: which answers to compare: `best_worst` the best with the worst, `adjacent` each with the next worse one,
            `all` every two.
        min_score_gap: do not compare answers whose scores differ by less; equal scores are never compared.
        pairs_per_prompt: maximum pairs per prompt, keeping the widest gaps; null keeps all.
        truncated: what to do with answers cut at `max_new_tokens`: `never_chosen` only uses them as the rejected one,
            `drop` leaves them out, `keep` treats them like any other.
        balance_length: among pairs with the same score gap, take the one closest in length; then drop pairs until the
            chosen answer is the longer one as often as it is the shorter one.
        max_rows: read at most this many rows; null reads all.
        seed: random seed for the split and for which pairs are dropped.
        overwrite: replace `out` and `eval_out`.
    """

    data: str = ""
    out: str = ""
    eval_out: str | None = None
    eval_split: float = number(0.0, least=0, below=1)
    prompt_column: str = "prompt"
    responses_column: str = "responses"
    scores_column: str = "scores"
    tools_column: str = "tools"
    system_column: str | None = "system"
    chat_template_kwargs_column: str | None = "chat_template_kwargs"
    pairs: PairChoice = "best_worst"
    min_score_gap: float = number(0.0, least=0)
    pairs_per_prompt: int | None = number(None, above=0)
    truncated: Literal["never_chosen", "drop", "keep"] = "never_chosen"
    balance_length: bool = False
    max_rows: int | None = number(None, above=0)
    seed: int = number(42, least=0, most=2**32 - 1)
    overwrite: bool = False


@dataclass
class DemoConfig(Settings):
    """Settings of `dpo-fast demo`.

    Attributes:
        out: output folder.
        quick: a smaller run, under a minute.
        seed: random seed.
    """

    out: str = "demo"
    quick: bool = False
    seed: int = number(0, least=0, most=2**32 - 1)


@dataclass
class ScoreConfig(ModelConfig, DataConfig):
    """Settings of `dpo-fast score`: those of `DataConfig` and `ModelConfig`, plus the following.

    Attributes:
        out: .jsonl file to write, one JSON object per pair.
        tokens: also write the log-probs of all tokens.
    """

    out: str = ""
    tokens: bool = False


@dataclass
class EvalConfig(SamplingConfig, SignalConfig, ModelConfig, DataConfig):
    """Settings of `dpo-fast eval`: those of the data, model, signal and sampling settings, plus the following.

    Attributes:
        reference: the model to compare `model` with.
        reference_base_url: with `backend` `openai`, address of the server of `reference`, or a list; null is
            `base_url`.
        beta: factor of the implicit reward.
        prompts: file or dataset of prompts for both models to answer, judged by `signals`; null compares no answers.
        plain_prompts: do not apply the chat template to string prompts.
        out: .json file to write; the answers go next to it, into a file ending in `.answers.jsonl`.
    """

    reference: str = ""
    reference_base_url: str | list[str] | None = None
    beta: float = number(0.1, above=0)
    prompts: str | None = None
    plain_prompts: bool = False
    out: str | None = None


@dataclass
class InspectConfig(ModelConfig, DataConfig):
    """Settings of `dpo-fast inspect`: those of `DataConfig` and `ModelConfig`, plus the following.

    Attributes:
        reference: the model to compare `model` with; without one, the rows are shown as they are trained on.
        rows: indices of the rows to show, from 0, such as `0-20` or `[0, 5]`; null shows the first few.
        beta: factor of the implicit reward.
        out: .html file to write; null only prints to the terminal.
    """

    reference: str = ""
    rows: list[int] | str | None = None
    beta: float = number(0.1, above=0)
    out: str | None = None


@dataclass
class ReportConfig(Settings):
    """Settings of `dpo-fast report`.

    Attributes:
        run: folder of a training run.
        out: .html file to write; null is `report.html` in that folder.
    """

    run: str = ""
    out: str | None = None


@dataclass
class LossConfig(Settings):
    """Which loss to train with.

    Attributes:
        loss_type: name of a preference loss (`dpo_fast.losses.LOSSES`), `module:function` for your own, or a list of
            names for a weighted sum.
        loss_weights: one weight per loss; null weights all by 1.
        beta: strength of the pull towards the reference.
        label_smoothing: probability that a label is flipped, for losses that use it.
        f_divergence_type: divergence that keeps the policy close to the reference: `reverse_kl` (DPO's), `forward_kl`,
            `js_divergence` or `alpha_divergence`.
        f_alpha_divergence_coef: alpha of `alpha_divergence`.
        discopop_tau: temperature of the modulation in `discopop`.
        dpop_lambda: weight of the penalty in `dpop`.
        simpo_gamma: target margin of `simpo` and `alphapo`, after beta.
        alphapo_alpha: shape of the reward in `alphapo`; 0 is SimPO.
        tpo_alpha: weight of the gold answer's term in `tpo`.
        score_scale: factor of the score gaps in `odpo` and `rpo`.
        desirable_weight: weight of chosen answers in `kto`.
        undesirable_weight: weight of rejected answers in `kto`.
        ld_alpha: LD-DPO: weight of the longer answer's tokens beyond the shorter one's length; null is 1.
        use_weighting: WPO: weight each pair by how likely the policy finds its answers.
    """

    loss_type: str | list[str] = "sigmoid"
    loss_weights: list[float] | None = None
    beta: float = number(0.1, above=0)
    label_smoothing: float = number(0.0, least=0, below=1)
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = number(0.05, above=0)
    dpop_lambda: float = 50.0
    simpo_gamma: float = 0.5
    alphapo_alpha: float = 0.25
    tpo_alpha: float = 1.0
    score_scale: float = 1.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    ld_alpha: float | None = number(None, least=0, most=1)
    use_weighting: bool = False


@dataclass
class DPOConfig(LossConfig, ModelConfig, DataConfig):
    """Settings of a training run: those of `DataConfig`, `ModelConfig` and `LossConfig`, plus the following.

    Attributes:
        output_dir: folder of the run.
        peft: train an adapter instead of the weights: `lora`, `dora`, or `qlora`, which is `lora` on 4-bit weights.
        use_peft: TRL's name for `peft` `lora`.
        lora_r: rank of the adapter.
        lora_alpha: scale of the adapter, which is multiplied by `lora_alpha / lora_r`.
        lora_dropout: dropout of the adapter's input.
        lora_target_modules: layers to adapt: `all-linear` is all but the head, or a list of names.
        sft_adapter: what to do with an adapter that `model` names: `merge` it into the weights, or `keep` it beneath
            the new one; `auto` keeps it on 4-bit weights. The result is the reference either way.
        merge_final: also write `merged/`, the trained model with the adapter added to its weights.
        ref_model: the reference, if it is not the model that training starts from.
        sync_ref_model: TR-DPO: let the reference follow the policy; it then stays in memory as a second model and
            scores every pack.
        ref_model_sync_steps: optimizer steps between two updates of the reference.
        ref_model_mixup_alpha: share of the policy in the updated reference; the rest is the old reference.
        eval_data: held-out rows, in any format that `data` takes.
        eval_split: share of `data` to hold out if `eval_data` is not given.
        eval_steps: evaluate every this many optimizer steps; null only evaluates at the end.
        learning_rate: peak learning rate.
        lr_scheduler_type: name of a transformers schedule (`linear`, `cosine`, `constant_with_warmup`, ...).
        warmup_steps: warm-up steps; a value below 1 is a share of all steps.
        optim: name of the optimizer; `auto` is `adamw_8bit_fused` for bfloat16 weights on a GPU, else `adamw_torch`.
        adam_beta1: Adam's first decay.
        adam_beta2: Adam's second decay.
        adam_epsilon: Adam's epsilon.
        weight_decay: weight decay of matrices; biases and norms have none.
        max_grad_norm: clip the gradient to this norm; 0 does not clip.
        gradient_release: step each weight during the backward and free its gradient; needs `adamw_8bit_fused`, no
            clipping, and one pack per step.
        per_device_train_batch_size: rows per micro-batch, each with one or more pairs (see `pairs`).
        gradient_accumulation_steps: micro-batches per optimizer step; the loss is the mean over all its pairs.
        num_train_epochs: passes over the rows, if `max_steps` is not given.
        max_steps: optimizer steps; -1 uses `num_train_epochs`.
        torch_compile: compile the decoder layers, once for packs of all sizes; needs a C++ compiler on a CPU.
        static_shapes: pad every pack to `max_tokens_per_batch`, so that compiled layers see a single size.
        gradient_checkpointing: recompute each layer's activations in the backward.
        activation_checkpointing: transformers' newer name for `gradient_checkpointing`; takes precedence if given.
        checkpointing_policy: which activations to recompute in the backward: `full` all of each layer's, `selective`
            those that are cheap, keeping the results of products and attention, `none` none. Null is `full` with
            `gradient_checkpointing`; otherwise none, or what it takes to fit in memory.
        activation_offloading: keep what `full` keeps, the input of each layer, in the host's memory.
        logging_steps: write metrics every this many steps.
        save_steps: write a checkpoint every this many steps; 0 only writes the final model.
        save_total_limit: number of checkpoints to keep; null keeps all.
        save_dtype: dtype of the weights in `final/`; `auto` takes that of the model that training started from if at
            least 99% of the weights that changed still differ in it, else the one that was trained in. Checkpoints keep
            the latter.
        resume: `auto` resumes from the newest complete checkpoint in `output_dir`; a folder resumes from that one.
        overwrite: start over in an `output_dir` that already holds a run.
        nproc: processes to start on this machine, one per GPU; `torchrun` starts them on several.
        parallel: what several processes share: `ddp` the rows, with whole weights in each, `fsdp` also weights,
            gradients and optimizer state; `auto` is `ddp` if that fits.
        seed: random seed for row order and dropout.
        dry_run: read the data, print the report and the plan, then stop.
    """

    output_dir: str = "runs/dpo"
    peft: Literal["none", "lora", "dora", "qlora"] = "none"
    use_peft: bool = False
    lora_r: int = number(16, above=0, most=65536)
    lora_alpha: float = number(32.0, above=0, most=1e6)
    lora_dropout: float = number(0.0, least=0, below=1)
    lora_target_modules: str | list[str] = "all-linear"
    sft_adapter: Literal["auto", "merge", "keep"] = "auto"
    merge_final: bool = False
    ref_model: str | None = None
    sync_ref_model: bool = False
    ref_model_sync_steps: int = number(512, above=0)
    ref_model_mixup_alpha: float = number(0.6, above=0, most=1)
    eval_data: str | None = None
    eval_split: float = number(0.0, least=0, below=1)
    eval_steps: int | None = number(None, least=0)
    learning_rate: float = number(1e-6, least=0)
    lr_scheduler_type: str = "linear"
    warmup_steps: float = number(0, least=0)
    optim: str = "auto"
    adam_beta1: float = number(0.9, least=0, below=1)
    adam_beta2: float = number(0.999, least=0, below=1)
    adam_epsilon: float = number(1e-8, above=0)
    weight_decay: float = number(0.0, least=0)
    max_grad_norm: float = number(1.0, least=0)
    gradient_release: bool = False
    per_device_train_batch_size: int = number(8, above=0)
    gradient_accumulation_steps: int = number(1, above=0)
    num_train_epochs: float = number(3.0, least=0)
    max_steps: int = number(-1, least=-1)
    torch_compile: bool = False
    static_shapes: bool = False
    gradient_checkpointing: bool = False
    activation_checkpointing: bool | None = None
    checkpointing_policy: Literal["none", "selective", "full"] | None = None
    activation_offloading: bool = False
    logging_steps: int = number(10, above=0)
    save_steps: int = number(500, least=0)
    save_total_limit: int | None = number(None, above=0)
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    resume: str | None = None
    overwrite: bool = False
    nproc: int = number(1, above=0, most=1024)
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    seed: int = number(42, least=0, most=2**32 - 1)
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Fold several names of one thing into one, so that saved settings hold one value."""
        super().__post_init__()
        if self.use_peft:
            self.peft, self.use_peft = "lora" if self.peft == "none" else self.peft, False
        if self.peft == "lora" and self.load_in_4bit:
            self.peft = "qlora"
        self.load_in_4bit = self.load_in_4bit or self.peft == "qlora"
        if self.activation_checkpointing is not None:
            self.gradient_checkpointing, self.activation_checkpointing = self.activation_checkpointing, None


@dataclass
class PlanConfig(DPOConfig):
    """Settings of `dpo-fast plan`: those of `DPOConfig`, plus the following.

    Attributes:
        model: checkpoint folder, Hub name, .gguf file, or a shape that is built in, such as `llama-3-8b`.
        gpu: card to plan for, such as `h100-80`, or `cpu`; null is what is here.
        gpus: how many of them.
        json: print the plan as JSON.
        out: .png, .svg or .pdf file to draw it to.
    """

    gpu: str | None = None
    gpus: int = number(1, above=0, most=65536)
    json: bool = False
    out: str | None = None
