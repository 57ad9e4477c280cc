"""Every setting of a run: nested frozen dataclasses, one per room that needs one.

The comment on a field is its documentation, with unit and, where there is one, the paper's value (arXiv
2506.08007). Defaults stand here and nowhere else. An experiment is a Python file whose `config()` returns a
`Config`; tyro turns the dataclasses into flags such as `--update.learning-rate 2e-6`.
"""

from dataclasses import dataclass, field
from typing import Literal

from rpt_jax.parts import parts_of_groups
from rpt_jax.ranges import require_in_range
from rpt_jax.records import InputError


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context."""

    kind: Literal["none", "llama3", "yarn"] = "none"
    factor: float = 1.0  # context extension, new / original
    original_context: int = 8192  # tokens the frequencies were trained for
    low_frequency_factor: float = 1.0  # llama3: wavelengths above original / this are stretched in full
    high_frequency_factor: float = 4.0  # llama3: wavelengths below original / this are left alone
    beta_fast: float = 32.0  # yarn: rotations over the original context above which nothing changes
    beta_slow: float = 1.0  # yarn: rotations below which a frequency is stretched in full
    attention_factor: float = 0.0  # yarn: factor on cos and sin; 0 means 0.1 ln(factor) + 1


@dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of the decoder: Llama, Qwen2/2.5 (qkv_bias) and Qwen3 (qk_norm)."""

    vocab_size: int = 256
    width: int = 128  # D
    layers: int = 4  # L
    heads: int = 4  # H, query heads
    kv_heads: int = 4  # K, divides heads
    head_channels: int = 32  # C, even
    hidden: int = 384  # F, width of the SwiGLU
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm over each head's channels before RoPE
    tied_head: bool = False  # the head is the transposed embedding
    context: int = 0  # tokens that a published model was made for, for `rpt convert` to pass on; 0: not said
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; softmax and norms run in float32
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "layer", "dots"] = "none"  # kept in the backward pass: all | layer inputs | matmul outputs

    def check(self) -> None:
        require_in_range(self, "model")
        if self.heads % self.kv_heads:
            divisors = ", ".join(str(k) for k in range(1, self.heads + 1) if self.heads % k == 0)
            raise InputError(
                f"model.heads={self.heads} is no multiple of model.kv_heads={self.kv_heads}: "
                f"use kv_heads from {divisors}"
            )
        if self.head_channels % 2:
            raise InputError(
                f"model.head_channels={self.head_channels} must be even, RoPE rotates pairs: "
                f"use {self.head_channels + 1}"
            )


@dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; -1 (at most one) takes what is left."""

    data: int = -1  # batch only
    fsdp: int = 1  # batch, and parameters split over it
    tensor: int = 1  # heads, hidden width and vocabulary
    coordinator: str = "auto"  # host:port of process 0 | auto: as Slurm or the Cloud TPU VM says | none: one process
    processes: int = 0  # how many, with a coordinator given
    process: int = -1  # this one's number, from 0


@dataclass(frozen=True)
class CorpusConfig:
    """Text files and the tokenizer that reads them."""

    files: tuple[str, ...] = ()  # .jsonl, .jsonl.gz, .parquet, .txt, .arrayrecord; globs allowed
    template: str = "{text}"  # how fields of a record become a document, e.g. "{problem}\n\n{solution}"
    tokenizer: str = ""  # .model (SentencePiece), tokenizer.json, or a folder with that or vocab.json + merges.txt
    on_bad_record: Literal["stop", "skip"] = "stop"  # skip counts and reports
    minimum_tokens: int = 2  # a shorter document is a bad record
    holdout: int = 0  # documents kept out of training, the last ones after the seeded shuffle (paper: 200)


@dataclass(frozen=True)
class PositionConfig:
    """Which annotated positions are trained on (paper: entropy above a threshold it does not state)."""

    annotated: str = ""  # folder written by `rpt annotate`
    # What is predicted: next_token (paper: what follows, one token or several) | next_segment: a whole sentence or line
    # from its beginning | masked_span: such a segment left out of the text, which is seen before and behind it (RLPT).
    target: Literal["next_token", "next_segment", "masked_span"] = "next_token"
    shortest_target: int = 4  # tokens of a segment, shorter ones are left out
    longest_target: int = 64  # tokens of a segment, longer ones are left out
    order: Literal["shuffled", "easy_to_hard"] = "shuffled"  # easy_to_hard: those of low entropy first
    stages: int = 4  # of easy_to_hard: the k-th part of the run draws from the k parts of lowest entropy
    # By entropy of the token, of a segment by the mean of its tokens'.
    select: Literal["threshold", "top_share", "random"] = "threshold"
    threshold: float = 1.5  # nats; easy / medium / hard evaluation splits are above 0.5 / 1.0 / 1.5
    share: float = 0.2  # of all positions, for top_share and random
    minimum_context: int = 1  # tokens before the position
    top_candidates: int = 16  # entropy over the proxy's best 16 tokens (paper: 16)
    renormalise: bool = True  # the 16 probabilities sum to 1 [open in the paper]
    window: int = 4096  # annotation: tokens the proxy sees; longer documents go through in windows overlapping by half
    batch_tokens: int = 8192  # annotation: tokens of one batch of the proxy, padding included
    start: str = ""  # annotation: piece put before what the proxy sees, where it expects one, e.g. <|begin_of_text|>

    def check(self) -> None:
        if not 1 <= self.shortest_target <= self.longest_target or self.stages < 1:
            raise InputError(
                f"positions: shortest_target={self.shortest_target}, longest_target={self.longest_target}, stages="
                f"{self.stages}: use 1 or more of each, and no shortest_target above longest_target"
            )


@dataclass(frozen=True)
class QuestionConfig:
    """Questions with verifiable answers, to train on in place of positions in text (reward.kind verified)."""

    files: tuple[str, ...] = ()  # as in corpus.files; given: training is on their questions
    question: str = "problem"  # field of the question
    answer: str = "answer"  # field of the answer, text or a number
    answer_after: str = ""  # the answer is what follows the last of these in its field, e.g. "####"; empty: all of it
    on_bad_record: Literal["stop", "skip"] = "stop"  # skip counts and reports
    train: int = 0  # questions trained on, by the seed; 0: all that are not held out (paper: 256)
    holdout: int = 0  # questions kept out of training, to evaluate on (paper: 200)
    evaluate_files: tuple[str, ...] = ()  # questions to evaluate on from files of their own, in place of a holdout
    workers: int = 2  # processes that judge answers
    seconds: float = 5.0  # for one answer; one that takes longer is stopped and counts as not right
    memory_mib: int = 1024  # of address space, for one answer

    def check(self, annotated: str = "") -> None:
        if annotated and (self.files or self.evaluate_files):
            raise InputError(
                f"questions.files and annotated text ({annotated!r}): a run is about one of them, so drop the other"
            )
        if self.workers < 1 or self.seconds <= 0 or self.memory_mib < 256:
            raise InputError(
                f"questions.workers={self.workers}, questions.seconds={self.seconds}, questions.memory_mib="
                f"{self.memory_mib}: use 1 or more workers, more than 0 seconds, 256 MiB or more (a worker takes 90)"
            )


@dataclass(frozen=True)
class PromptConfig:
    """How a context becomes a prompt."""

    # v0..v6 | segment, span (by positions.target) | question | bare, bare_span | path to a template file
    template: str = "v0"
    chat: Literal["none", "r1", "chatml"] = "none"  # turn markers around it: R1 distillations | Qwen2.5 and Qwen3
    max_tokens: int = 4096  # head + context + tail; a longer context loses its left end (paper: 4096)
    truth_bytes: int = 256  # bytes of continuation kept for the reward; a longer prediction earns 0, a target must fit


@dataclass(frozen=True)
class SampleConfig:
    """How rollouts are drawn."""

    group_size: int = 8  # G (paper: 8)
    temperature: float = 0.8  # 0 is greedy (paper: 0.8)
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # relative to the most probable token; 0: off
    max_tokens: int = 8192  # R, response limit (paper: 8192)
    end_tokens: tuple[str, ...] = ()  # pieces that end a response; empty: the tokenizer's end-of-text token
    tokens_per_call: int = 32  # decode steps between looks by the host, fewer where enough rollouts have ended
    slots: int = 0  # rollouts decoded at one time, the others wait; 0: all of a batch

    def check(self) -> None:
        if self.max_tokens < 1 or self.tokens_per_call < 1:
            raise InputError(
                f"sample.max_tokens={self.max_tokens} and sample.tokens_per_call={self.tokens_per_call}: use 1 or more"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p < 1 or self.top_k < 0:
            raise InputError(
                f"sample: temperature={self.temperature} must be >= 0, top_p={self.top_p} in (0, 1], "
                f"min_p={self.min_p} in [0, 1), top_k={self.top_k} >= 0"
            )


@dataclass(frozen=True)
class RewardConfig:
    """What rollouts earn in training; evaluation and `accuracy` count prefix matching always, of segments exact."""

    # prefix: the answer is the next tokens, byte for byte (paper) | first_token: it begins with the next token | dense:
    # where it is wrong, the policy's probability of its first token | conditional_dense: dense in groups with a right
    # answer, else 0 | information_gain: how much the thought alone adds to the next token's log-prob, nats (RLP) |
    # verified: the answer means what the question's reference says (the only kind for questions, which counts there) |
    # exact: the answer is the whole target, the next token or the segment | judged: what `judge` says, 0 to 1.
    kind: Literal[
        "prefix", "first_token", "dense", "conditional_dense", "information_gain", "verified", "exact", "judged"
    ] = "prefix"
    judge: str = ""  # judged: FILE.py:FUNCTION(contexts, predictions, truths) -> scores, see learning/custom_judge.py
    ema_decay: float = 0.999  # information_gain: per update, of the average of policies that predicts without a thought
    opening: str = ""  # information_gain: text between thought and next token (RLP: none), e.g. \boxed{

    def check(self, advantage: str, target: str = "next_token") -> None:
        if not 0 <= self.ema_decay <= 1:
            raise InputError(f"reward.ema_decay={self.ema_decay}: use 0 to 1 (RLP: 0.999)")
        if self.kind == "information_gain" and advantage != "leave_one_out":
            raise InputError(
                f"reward.kind=information_gain with update.advantage={advantage}: gains are compared with those of the "
                "group's other rollouts, as RLP does; use --update.advantage leave_one_out"
            )
        if self.kind == "information_gain" and target != "next_token":
            raise InputError(
                f"reward.kind=information_gain with positions.target={target}: it scores one token that follows, no "
                "segment; use --positions.target next_token or another reward"
            )
        if (self.kind == "judged") != bool(self.judge):
            raise InputError(
                f"reward.kind={self.kind} with reward.judge={self.judge!r}: kind judged, and no other, needs a judge, "
                "--reward.kind judged --reward.judge FILE.py:FUNCTION"
            )


@dataclass(frozen=True)
class UpdateConfig:
    """GRPO and its optimizer."""

    learning_rate: float = 1e-6  # (paper: 1e-6)
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # after warmup [open in the paper]
    warmup_steps: int = 0
    beta1: float = 0.9  # (paper: 0.9)
    beta2: float = 0.999  # (paper: 0.999)
    first_moment: Literal["float32", "bfloat16"] = "float32"  # Adam's mean of gradients; the second stays float32
    weight_decay: float = 0.01  # (paper: 0.01)
    max_gradient_norm: float = 1.0  # global-norm clip; 0: off ("actor gradient clip 0.2" of the paper is ambiguous)
    advantage: Literal["std", "mean", "leave_one_out"] = "std"  # (r-mean)/(std+eps) | Dr. GRPO | G/(G-1)(r-mean)
    advantage_epsilon: float = 1e-6
    on_policy: bool = True  # ratio 1 in value (paper); False: ratio to the sampler's log-probs (repeated updates)
    clip_low: float = 0.2  # ratio clip 1 - low; acts only when an update is off-policy
    clip_high: float = 0.2
    aggregate: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    kl_coefficient: float = 0.0  # to the starting policy, k3 estimator (paper: 0)
    entropy_coefficient: float = 0.0  # bonus (paper: 0)
    next_token_share: float = 0.0  # s: (1-s) of this loss + s of next-token cross entropy on training text (paper: 0)
    next_token_sequences: int = 0  # windows of text each update reads for that; 0: as many as batch_size
    next_token_length: int = 512  # tokens of such a window
    microbatches: int = 1  # gradient accumulation, parts of like many tokens; a few prompts: parts of groups
    check_shared_prefix: Literal["never", "first_step", "every_shape"] = "first_step"  # against whole sequences, a few
    token_chunk: int = 0  # tokens whose logits exist at one time where no Pallas kernel runs; 0: by the backend


@dataclass(frozen=True)
class DynamicSamplingConfig:
    """DAPO: groups whose rewards all agree are dropped and others sampled in their place."""

    from_step: int = -1  # updates made before it acts (paper: 500); -1: never
    max_rounds: int = 4  # extra sampling rounds a step before the batch is filled with what there is


@dataclass(frozen=True)
class PretrainConfig:
    """Next-token and supervised fine-tuning of the same decoder (base models, cold starts, controls)."""

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: fewer steps for a small base from scratch
    learning_rate: float = 3e-3
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    batch_size: int = 64  # sequences
    sequence_length: int = 128  # tokens
    steps: int = 1000
    token_chunk: int = 0  # as in the update


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 50  # steps
    keep: int = 2  # newest checkpoints kept
    folder: str = ""  # gs://bucket/run, or a local one; empty: run_folder/checkpoints. Takes the run's small files, too
    on_damaged: Literal["stop", "previous"] = "stop"  # previous: sets a damaged one aside and goes on from that before


@dataclass(frozen=True)
class EvaluateConfig:
    annotated: str = ""  # folder `rpt annotate` writes for the corpus.holdout documents; empty: no evaluation
    every: int = 100  # steps; 0: only at the end
    positions: int = 512  # held-out positions per split, the same for both modes; 0: all
    group_size: int = 1  # rollouts per position
    pass_at: int = 0  # k of Pass@k, at most group_size; 0: group_size
    temperature: float = 0.8  # 0 is greedy
    greedy: bool = False  # a greedy rollout per position too, reported beside the sampled ones
    batch_size: int = 64  # positions


@dataclass(frozen=True)
class Config:
    """One run of reinforcement pre-training."""

    name: str = "run"  # shown by progress display and trackers
    seed: int = 0  # of positions, rollouts, and what is held out
    steps: int = 1000  # policy updates (paper: 1000)
    flops: float = 0.0  # the run ends after the update that reaches so many, too; 0: off. Schedules go by steps
    batch_size: int = 256  # N, prompts a step (paper: 256)
    policy: str = ""  # the starting policy: a policy folder, or a run folder (its newest checkpoint)
    run_folder: str = "runs/run"  # where everything is written; a run that is there is continued
    model: ModelConfig = field(default_factory=ModelConfig)  # the policy says the shape; dtypes and remat count
    mesh: MeshConfig = field(default_factory=MeshConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    positions: PositionConfig = field(default_factory=PositionConfig)
    questions: QuestionConfig = field(default_factory=QuestionConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    rollouts_logged: int = 8  # rollouts written to rollouts.jsonl each step
    profile: bool = False  # the run's second update is traced by jax.profiler into run_folder/profile
    wandb: bool = False  # log to Weights & Biases too (extra `wandb`)

    def check(self) -> None:
        """Raises InputError for settings that clash, before anything is compiled."""
        self.model.check()
        self.sample.check()
        self.questions.check(self.positions.annotated or self.evaluate.annotated)
        self.positions.check()
        self.reward.check(self.update.advantage, self.positions.target)
        if self.sample.group_size < 2:
            raise InputError(
                f"sample.group_size={self.sample.group_size}: GRPO compares the rollouts of a prompt with each "
                "other, so a group of 1 has advantage 0 always; use 2 or more (paper: 8)"
            )
        if self.batch_size < 1 or self.update.microbatches < 1:
            raise InputError(
                f"batch_size={self.batch_size}, update.microbatches={self.update.microbatches}: use 1 or more of each"
            )
        if not self.flops >= 0:
            raise InputError(f"flops={self.flops}: use a number of FLOPs, or 0 to end by steps alone")
        parts_of_groups(self.batch_size, self.sample.group_size, self.update.microbatches)
