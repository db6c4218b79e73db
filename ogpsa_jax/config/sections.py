"""The sections of a run's configuration. Every key is documented here; ``--help`` and the docs are
made from it.
"""

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ogpsa_jax.remat import Remat

FloatDType = Literal["float32", "bfloat16", "float16"]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """A part of the configuration: strict, and immutable once made."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class LoraSection(Section):
    """Low-rank adapters instead of full fine-tuning."""

    rank: PositiveInt = Field(8, description="rank of the adapters")
    alpha: PositiveFloat = Field(16.0, description="scale: the adapter is multiplied by alpha/rank")
    dropout: DecayRate = Field(0.0, description="dropout on the adapter's input")
    adapter: str | None = Field(
        None, description="PEFT adapter folder to start from; its rank, alpha and targets apply"
    )
    targets: tuple[LoraTarget, ...] = Field(
        get_args(LoraTarget),
        min_length=1,
        description="names of the linear layers that get an adapter",
    )


class ModelSection(Section):
    """Which model, and in what precision."""

    path: str | None = Field(
        None,
        description="Hugging Face folder or hub id; in a later stage of a sequence, left out, "
        "the stage before",
    )
    tokenizer: str | None = Field(
        None, description="folder or hub id of the tokenizer, where it is not beside the model"
    )
    initial_weights: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: take only config and tokenizer from `path`"
    )
    dtype: FloatDType = Field("bfloat16", description="of the computation")
    param_dtype: FloatDType = Field("float32", description="of parameters and optimizer state")
    attention: Literal["auto", "xla", "cudnn", "splash"] = Field(
        "auto",
        description="kernel of attention; auto: splash on TPUs, cudnn on GPUs in half precision, "
        "else xla",
    )
    lora: LoraSection | None = Field(None, description="adapters; null: full fine-tuning")


class SourceSection(Section):
    """One data set: a file, a folder or a hub id."""

    path: str = Field(min_length=1, description="file, folder or hub id")
    split: str = Field(
        "train", description="split, with the slice syntax of datasets, as in train[:2000]"
    )
    format: str = Field("auto", description="record format; auto: recognised by its columns")
    weight: float = Field(1.0, ge=1e-6, description="share of this source in the mixture")
    samples: PositiveInt | None = Field(None, description="take this many rows, drawn by seed")


class EvalSection(SourceSection):
    """A held-out set and what is measured on it."""

    measure: Literal["response", "all_tokens", "preference"] = Field(
        "response",
        description="cross-entropy of the answers or of all tokens; preference: how often and by "
        "how much the chosen answer is the likelier one",
    )


class DataSection(Section):
    """What is trained on."""

    train: tuple[SourceSection, ...] = Field((), description="the training sources")
    eval: dict[str, EvalSection] = Field(
        default_factory=dict, description="named held-out sources whose loss is reported"
    )
    template: str | None = Field(
        None, description="chat template: built-in name or jinja file; null: the tokenizer's"
    )
    max_length: int = Field(2048, ge=2, description="tokens a row may have; longer answers are cut")
    too_long: Literal["refuse", "skip", "cut"] = Field(
        "refuse",
        description="a row whose prompt alone fills max_length: refuse the run; skip the row; cut "
        "the middle out of the prompt",
    )
    packing: bool = Field(True, description="several documents a row, isolated (SFT only)")


class InStepSection(Section):
    """References that come with every step, one backward pass each, no extra samples."""

    share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.5, description="share of every batch that is reference rows"
    )
    window: PositiveInt | None = Field(
        None,
        description="reference gradients the basis remembers; null: this batch's alone",
    )
    replay_weight: NonNegativeFloat = Field(
        1.0,
        description="weight of the training on reference rows; with few of them, "
        "such as a hundred, more may be better",
    )


class OwnAnswersSection(Section):
    """How the initial model answers the reference prompts, with references.answers: own."""

    max_new_tokens: PositiveInt = Field(512, description="tokens an answer may have, at most")
    temperature: NonNegativeFloat = Field(
        0.0, description="0: the likeliest tokens; otherwise drawn, by the run's seed"
    )


class ReferencesSection(Section):
    """The general-capability examples whose gradients, or inputs, span the reference subspace."""

    sets: tuple[SourceSection, ...] = Field(
        (), description="with a span of gradients, one reference gradient per set"
    )
    batch_size: PositiveInt = Field(4, description="rows a reference micro-batch")
    loss: Literal["response", "all_tokens", "dpo", "official"] = Field(
        "response",
        description="response: answer tokens; all_tokens; dpo: the DPO loss on general pairs; "
        "official: cross-entropy over chosen and rejected answers, as the published code",
    )
    rows_per_refresh: PositiveInt | None = Field(
        None,
        description="rows that a refresh takes, in turn, out of all of them; null: all. A multiple "
        "of references.batch_size for each set",
    )
    target: Literal["answers", "initial"] = Field(
        "answers",
        description="what the loss compares the model with: the rows' answers; initial: what the "
        "initial model predicts there (KL divergence), for which prompts alone will do; with a "
        "subspace of inputs, where references.in_step is set",
    )
    answers: Literal["given", "own"] = Field(
        "given", description="own: the initial model writes the answers first"
    )
    own_answers: OwnAnswersSection = Field(
        default_factory=OwnAnswersSection, description="how the initial model writes its answers"
    )
    initial_model: str | None = Field(
        None,
        description="folder or hub id of the initial model; null: the one that the first stage of "
        "this pipeline started from",
    )
    top_k: PositiveInt | None = Field(
        None,
        description="tokens kept of each of its predictions; null: the fewest of 8, 16, ..., 256 "
        "that leave at most 1 % of the probability to the rest, on average",
    )
    in_step: InStepSection | None = Field(
        None, description="references inside every batch; null: refreshed at intervals"
    )


class RefreshSection(Section):
    """When the basis is refreshed if references are not in_step: set one of the two."""

    every: PositiveInt | None = Field(None, description="steps between refreshes")
    distance: PositiveFloat | None = Field(
        None,
        description="how far the trained parameters move before the next refresh: the norm of "
        "their change since the last one, as a share of their norm then",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> "RefreshSection":
        if (self.every is None) == (self.distance is None):
            given = "neither" if self.every is None else "both"
            raise ValueError(f"set one of every and distance, not {given}")
        return self

    @property
    def shown(self) -> str:
        """The key that is set, and its value."""
        if self.every is not None:
            return f"ogpsa.refresh.every ({self.every})"
        return f"ogpsa.refresh.distance ({self.distance:g})"


class OgpsaSection(Section):
    """The projection. `preset` sets every other key that is left out."""

    preset: Literal["paper", "recommended", "in-step", "off"] = Field(
        "recommended",
        description="fills in what is left out below and in references.in_step and "
        "references.loss (docs/training.md); off: no projection",
    )
    subspace: Literal["gradients", "inputs"] = Field(
        description="spanned by reference gradients (the paper), or by what the layers' matrices "
        "multiply on the reference rows, measured once before training; docs/method.md"
    )
    rank: PositiveInt = Field(
        description="directions kept per group, at most 64; with inputs, columns of a layer's "
        "basis at most"
    )
    energy: Annotated[float, Field(ge=1e-3, le=1.0)] | None = Field(
        description="with inputs: share of their second moment that the basis covers"
    )
    others: Literal["freeze", "leave"] | None = Field(
        description="with inputs: whether other leaves (embeddings, norms, biases) are trained "
        "(leave) or not (freeze)"
    )
    scope: Literal["tensor", "global"] = Field(
        description="one subspace per weight tensor (official code) or one for all"
    )
    placement: Literal["gradient", "update", "both"] = Field(
        description="project what enters the optimizer, what leaves it, or both"
    )
    rule: Literal["orthogonal", "conflict", "inplane", "none"] = Field(
        description="what happens to the in-span component"
    )
    scale: NonNegativeFloat = Field(description="rule conflict: factor where it agrees")
    refresh: RefreshSection | None = Field(
        description="when the basis is refreshed; null: never, as with references.in_step "
        "and with inputs"
    )
    project_momentum: bool = Field(description="project first moments with each new basis")
    basis_dtype: FloatDType | None = Field(description="null: the parameters'")
    offload: bool = Field(
        description="basis and moments in pinned host memory between uses, for devices whose own "
        "is too small"
    )


class OptimizerSection(Section):
    """AdamW and its schedule."""

    name: Literal["adamw", "column_adamw"] = Field(
        "adamw",
        description="column_adamw: AdamW with one second moment for each output of a matrix; its "
        "scaling commutes with a subspace of inputs",
    )
    learning_rate: PositiveFloat = Field(
        description="peak learning rate; no default fits all: the paper's runs of 7B and 8B models "
        "use 1e-6, LoRA and smaller models need a higher one (from 3e-5 to 3e-3 in configs/), and "
        "docs/rates.md says how to find it"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after warm-up")
    warmup_steps: NonNegativeInt = Field(0, description="linear warm-up")
    betas: tuple[DecayRate, DecayRate] = Field((0.9, 0.999), description="AdamW's decay rates")
    eps: PositiveFloat = Field(1e-8, description="AdamW's epsilon")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled; matrices only")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="clip, after the projection")
    stochastic_rounding: bool = Field(
        False,
        description="round parameters up or down at random, so that updates smaller than their "
        "precision take effect on average; for model.param_dtype: bfloat16",
    )


class ProfileSection(Section):
    """Steps of which a trace is written."""

    start: PositiveInt = Field(10, description="first step, from 1; compilation is over by then")
    steps: PositiveInt = Field(3, description="how many")


class TrainSection(Section):
    """How long, in what pieces, and what is kept."""

    epochs: PositiveFloat = Field(3, description="passes over the data, unless `steps` is given")
    steps: PositiveInt | None = Field(None, description="optimizer steps; overrides epochs")
    batch_size: PositiveInt = Field(128, description="rows an optimizer step, over all devices")
    micro_batch_size: PositiveInt = Field(4, description="rows of a device at a time, at most")
    remat: Remat = Field(
        "full",
        description="what the backward pass computes again: nothing, all of a layer, or all but "
        "what is saved (matrix products, or those of attention), on the device or offloaded to "
        "pinned host memory; docs/training.md",
    )
    loss_chunk: PositiveInt = Field(512, description="tokens whose logits exist at a time, per row")
    eval_every: PositiveInt | None = Field(None, description="steps; null: before and after only")
    save_every: PositiveInt = Field(100, description="steps between checkpoints")
    keep_checkpoints: PositiveInt = Field(2, description="checkpoints kept")
    log_every: PositiveInt = Field(5, description="steps between flushes of the metrics")
    profile: ProfileSection | None = Field(
        None, description="write a trace of some steps, for TensorBoard and Perfetto"
    )
    compilation_cache: str | None = Field(
        "auto",
        description="folder of compiled programs, for the next run; auto: in the user's cache on "
        "accelerators, none on CPUs; null: none. Where JAX_COMPILATION_CACHE_DIR is set, that "
        "counts",
    )


class ExportSection(Section):
    """The Hugging Face folder that a run leaves."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of its weights; auto: each tensor in the type it has in the model's folder. "
        "What rounding costs is measured; a later stage starts from the unrounded weights",
    )


class DpoSection(Section):
    """Direct preference optimisation."""

    beta: PositiveFloat = Field(0.2, description="inverse temperature")
    loss: Literal["sigmoid", "ipo", "hinge", "robust", "orpo", "simpo"] = Field(
        "sigmoid", description="preference loss"
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        0.0, description="probability that a label is flipped (cDPO, robust)"
    )
    simpo_gamma: NonNegativeFloat = Field(0.5, description="SimPO's target margin, in rewards")
    reference_model: str = Field(
        "initial",
        description="initial: the weights the stage starts from; a folder or hub id; none (orpo "
        "and simpo, which have no reference model)",
    )


class MeshSection(Section):
    """Devices along each axis; -1: all that are left."""

    data: int = Field(1, description="replicas of parameters and optimizer state, in each slice")
    fsdp: int = Field(-1, description="shards of parameters, optimizer state and basis")
    context: PositiveInt = Field(
        1,
        description="shards of the tokens of a row, and of what fsdp shards; for rows of 32,768 "
        "tokens and more, and must divide data.max_length",
    )
    tensor: int = Field(1, description="shards of heads, hidden units and vocabulary")
    dcn_data: int = Field(
        -1,
        description="replicas across slices, which the data-center network connects (TPU slices; "
        "hosts of GPUs); multiplies data; -1: one in each slice, 1: fsdp goes over all slices",
    )

    @model_validator(mode="after")
    def _sizes(self) -> "MeshSection":
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"sizes must be positive, at most one of them -1, not {sizes}")
        if self.dcn_data < 1 and self.dcn_data != -1:
            raise ValueError(f"dcn_data must be positive or -1, not {self.dcn_data}")
        return self
