"""The one schema of a run. Every key is documented here; ``--help`` and the docs are made from it.

Unknown keys are refused. A preset fills in those keys of ``ogpsa`` (and ``references.loss``) that
the configuration leaves open, so a resolved configuration is explicit and round-trips.
"""

from pathlib import PurePath
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from ogpsa_jax.objectives.dpo import REFERENCE_FREE
from ogpsa_jax.training.origin import Origin

FloatDType = Literal["float32", "bfloat16", "float16"]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]

PRESETS: dict[str, dict[str, Any]] = {
    # The published method: gradient placement, stale first moment left as it is.
    "paper": {"placement": "gradient", "rank": 2, "project_momentum": False},
    # How these were found: docs/recommended.md.
    "recommended": {"placement": "gradient", "rank": 2, "project_momentum": True},
    "off": {},
}
# Preset recommended, unless the configuration has a word on it (or projects updates, into which
# nothing can be replayed): references that ride in every batch cost no extra samples.
RECOMMENDED_IN_STEP: dict[str, Any] = {"share": 0.5, "window": 64, "replay_weight": 1.0}
# With references that are also trained on, projecting the first moment would take out again what
# they put in.
RECOMMENDED_WITH_REPLAY: dict[str, Any] = {"rank": 4, "project_momentum": False}
# With a subspace of inputs: docs/method.md. What is replayed loses its part in the subspace too, so
# that it weighs more, and nothing is refreshed.
RECOMMENDED_INPUTS: dict[str, Any] = {
    "placement": "both",
    "rank": 1024,
    "energy": 0.95,
    "others": "freeze",
    "project_momentum": False,
}
RECOMMENDED_INPUTS_IN_STEP: dict[str, Any] = {"share": 0.5, "replay_weight": 8.0}
# Refresh intervals of the published commands (paper, appendix; official training scripts).
PUBLISHED_REFRESH_EVERY = {"sft": 30, "dpo": 5}


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
        None, description="PEFT adapter folder to start from; its rank, alpha and targets hold"
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
    """References that ride in the training batch, one backward pass each, no extra samples."""

    share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.5, description="share of every batch that is reference rows"
    )
    window: PositiveInt = Field(
        64, description="reference gradients the basis remembers; 1: this batch's mean only"
    )
    replay_weight: NonNegativeFloat = Field(
        1.0,
        description="weight with which reference rows are trained on as well; with few of them, "
        "a hundred, say, more may be better",
    )


class OwnAnswersSection(Section):
    """How the initial model answers the reference prompts, with references.answers: own."""

    max_new_tokens: PositiveInt = Field(512, description="tokens an answer may have, at most")
    temperature: NonNegativeFloat = Field(
        0.0, description="0: the likeliest tokens; otherwise drawn, by the run's seed"
    )


class ReferencesSection(Section):
    """The general-capability examples whose gradients span the reference subspace."""

    sets: tuple[SourceSection, ...] = Field((), description="one reference gradient per set")
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
        "initial model predicts there (KL divergence), for which prompts alone will do",
    )
    answers: Literal["given", "own"] = Field(
        "given", description="own: the initial model writes the answers first"
    )
    own_answers: OwnAnswersSection = Field(
        default_factory=OwnAnswersSection, description="how it writes them"
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


class OgpsaSection(Section):
    """The projection."""

    preset: Literal["paper", "recommended", "off"] = Field(
        "recommended", description="fills in the keys below that are left out; off: no projection"
    )
    subspace: Literal["gradients", "inputs"] = Field(
        "gradients",
        description="spanned by reference gradients (the paper), or by what the layers' matrices "
        "multiply on the reference rows, measured once before training; docs/method.md",
    )
    rank: PositiveInt = Field(
        2,
        description="directions kept per group, at most 64; 4 where recommended replays; with "
        "inputs, columns of a layer's basis at most, 1024 where left out",
    )
    energy: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None,
        description="with inputs: share of their second moment that the basis holds; 0.95 where "
        "left out",
    )
    others: Literal["freeze", "leave"] | None = Field(
        None,
        description="with inputs: whether what is no matrix (embeddings, norms, biases) is trained "
        "(leave) or not (freeze, where left out; adapters: leave)",
    )
    scope: Literal["tensor", "global"] = Field(
        "tensor", description="one subspace per weight tensor (official code) or one for all"
    )
    placement: Literal["gradient", "update", "both"] = Field(
        "gradient", description="project what enters the optimizer, what leaves it, or both"
    )
    rule: Literal["orthogonal", "conflict", "inplane", "none"] = Field(
        "orthogonal", description="what happens to the in-span component"
    )
    scale: NonNegativeFloat = Field(1.0, description="rule conflict: factor where it agrees")
    refresh_every: PositiveInt = Field(
        30, description="steps between refreshes, where references are not in_step; 5 in dpo"
    )
    project_momentum: bool = Field(
        True,
        description="project first moments with each new basis; false in paper, and where "
        "recommended replays or projects updates",
    )
    basis_dtype: FloatDType | None = Field(None, description="null: the parameters'")
    offload: Literal[False] = Field(
        False, description="basis in host memory between uses: not supported yet"
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
        "use 1e-6, LoRA and smaller models need a higher one (from 3e-5 to 1e-3 in configs/), and "
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


class TrainSection(Section):
    """How long, in what pieces, and what is kept."""

    epochs: PositiveFloat = Field(3, description="passes over the data, unless `steps` is given")
    steps: PositiveInt | None = Field(None, description="optimizer steps; overrides epochs")
    batch_size: PositiveInt = Field(128, description="rows an optimizer step, over all devices")
    micro_batch_size: PositiveInt = Field(4, description="rows a device holds at a time, at most")
    remat: Literal["none", "dots", "full"] = Field("full", description="rematerialisation")
    loss_chunk: PositiveInt = Field(512, description="tokens whose logits exist at a time, per row")
    eval_every: PositiveInt | None = Field(None, description="steps; null: before and after only")
    save_every: PositiveInt = Field(100, description="steps between checkpoints")
    keep_checkpoints: PositiveInt = Field(2, description="checkpoints kept")
    log_every: PositiveInt = Field(5, description="steps between flushes of the metrics")


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

    data: int = Field(1, description="replicas of parameters and optimizer state")
    fsdp: int = Field(-1, description="shards of parameters, optimizer state and basis")
    tensor: int = Field(1, description="shards of heads, hidden units and vocabulary")

    @model_validator(mode="after")
    def _sizes(self) -> "MeshSection":
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"sizes must be positive, at most one of them -1, not {sizes}")
        return self


class RunConfig(Section):
    """One stage of fine-tuning."""

    objective: Literal["sft", "dpo"] = Field("sft", description="what is minimised")
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    references: ReferencesSection = Field(default_factory=ReferencesSection)
    ogpsa: OgpsaSection = Field(default_factory=OgpsaSection)
    optimizer: OptimizerSection
    train: TrainSection = Field(default_factory=TrainSection)
    dpo: DpoSection = Field(default_factory=DpoSection)
    export: ExportSection = Field(default_factory=ExportSection)
    mesh: MeshSection = Field(default_factory=MeshSection)
    output_dir: str = Field("runs/run", pattern=r"\S", description="the run directory")
    seed: int = Field(0, ge=0, lt=2**31, description="of data order, adapters and random weights")
    _origin: Origin = PrivateAttr(default_factory=Origin)

    @model_validator(mode="before")
    @classmethod
    def _name_the_missing_rate(cls, raw: Any) -> Any:
        """Without the section `optimizer`, it is its `learning_rate` that is missing."""
        if isinstance(raw, dict) and raw.get("optimizer") is None:
            return {**raw, "optimizer": {}}
        return raw

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("ogpsa", {}), dict):
            return raw
        objective = raw.get("objective", "sft")
        ogpsa, references = dict(raw.get("ogpsa", {})), raw.get("references", {})
        preset = ogpsa.get("preset", "recommended")
        defaults = dict(PRESETS.get(str(preset), {}))
        if isinstance(objective, str) and objective in PUBLISHED_REFRESH_EVERY:
            defaults["refresh_every"] = PUBLISHED_REFRESH_EVERY[objective]
        if isinstance(references, dict):
            if ogpsa.get("subspace") == "inputs":
                defaults |= RECOMMENDED_INPUTS
                if isinstance(model := raw.get("model"), dict) and model.get("lora") is not None:
                    defaults["others"] = "leave"
                if preset == "recommended":
                    references = {"in_step": RECOMMENDED_INPUTS_IN_STEP, **references}
            elif preset == "paper" and objective == "dpo":
                references = {"loss": "official", **references}
            elif preset == "recommended" and ogpsa.get("placement") == "update":
                # What leaves the optimizer is projected, whatever its moments hold.
                defaults["project_momentum"] = False
            elif preset == "recommended" and ogpsa.get("placement", "gradient") == "gradient":
                references = {"in_step": RECOMMENDED_IN_STEP, **references}
                in_step = references["in_step"]
                if isinstance(in_step, dict) and in_step.get("replay_weight", 1.0):
                    defaults |= RECOMMENDED_WITH_REPLAY
        return {**raw, "ogpsa": {**defaults, **ogpsa}, "references": references}

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.projects and not self.references.sets:
            raise ValueError(
                "references.sets is empty, so there is nothing to project against: name a "
                "reference set, or set ogpsa.preset to off"
            )
        if self.optimizer.stochastic_rounding and self.model.param_dtype != "bfloat16":
            raise ValueError(
                "optimizer.stochastic_rounding is for model.param_dtype: bfloat16, not "
                f"{self.model.param_dtype}"
            )
        self._check_subspace()
        self._check_rows_per_refresh()
        if self.dpo.reference_model == "none" and self.dpo.loss not in REFERENCE_FREE:
            raise ValueError(
                f"dpo.reference_model: the loss {self.dpo.loss} needs one; none goes with "
                f"{' and '.join(REFERENCE_FREE)}"
            )
        if self.objective == "sft" and self.references.loss in ("dpo", "official"):
            raise ValueError(f"references.loss: {self.references.loss} needs objective: dpo")
        if self.references.loss in ("dpo", "official"):
            if self.references.target == "initial":
                raise ValueError(
                    f"references.target: initial cannot go with references.loss: "
                    f"{self.references.loss}; set references.loss to response or all_tokens"
                )
            if self.references.answers == "own":
                raise ValueError(
                    f"references.answers: own gives no pairs for references.loss: "
                    f"{self.references.loss}; set references.loss to response or all_tokens"
                )
        in_step = self.references.in_step
        if self.projects and in_step is not None:
            if not 1 <= self.reference_rows < self.train.batch_size:
                raise ValueError(
                    f"references.in_step.share: {in_step.share} of train.batch_size "
                    f"({self.train.batch_size}) must leave at least one row on both sides"
                )
            spans_gradients = self.ogpsa.subspace == "gradients"
            if in_step.replay_weight and spans_gradients and self.ogpsa.placement != "gradient":
                raise ValueError(
                    "references.in_step.replay_weight: a projected update cannot hold the replayed "
                    "gradient; set it to 0, or ogpsa.placement to gradient"
                )
        return self

    def _check_rows_per_refresh(self) -> None:
        section = self.references
        rows, unit = section.rows_per_refresh, section.batch_size * len(section.sets)
        if rows is None or not self.projects:
            return
        if section.in_step is not None or self.ogpsa.subspace == "inputs":
            raise ValueError(
                "references.rows_per_refresh: nothing is refreshed at intervals here; leave it "
                "out, or set references.in_step to null and ogpsa.subspace to gradients"
            )
        if rows % unit:
            raise ValueError(
                f"references.rows_per_refresh: {rows} is no multiple of references.batch_size "
                f"times the number of sets ({unit}); take {-(-rows // unit) * unit}"
            )

    def _check_subspace(self) -> None:
        ogpsa = self.ogpsa
        if ogpsa.subspace == "gradients":
            if ogpsa.rank > 64:
                raise ValueError(f"ogpsa.rank: {ogpsa.rank} gradients do not fit; 64 at most")
            for name in ("energy", "others"):
                if getattr(ogpsa, name) is not None:
                    raise ValueError(f"ogpsa.{name} needs ogpsa.subspace: inputs")
            return
        if ogpsa.preset == "paper":
            raise ValueError("ogpsa.preset: paper spans gradients; leave ogpsa.subspace out")
        if ogpsa.rule == "conflict":
            raise ValueError("ogpsa.rule: conflict needs ogpsa.subspace: gradients")
        if ogpsa.placement == "gradient" and self.optimizer.name == "adamw":
            raise ValueError(
                "ogpsa.placement: gradient alone does not keep AdamW's steps out of a subspace of "
                "inputs; set it to both, or optimizer.name to column_adamw"
            )
        if ogpsa.placement == "update" and self.optimizer.name == "adamw":
            raise ValueError(
                "ogpsa.placement: what update alone leaves of AdamW's steps, with a subspace of "
                "inputs, is no descent of the loss; set it to both, or optimizer.name to "
                "column_adamw"
            )
        if self.model.lora is not None and self.model.lora.adapter is not None:
            raise ValueError(
                "model.lora.adapter: what an adapter has learnt already may lie in the subspace of "
                "inputs; merge it into the model first, or set ogpsa.subspace to gradients"
            )

    @property
    def projects(self) -> bool:
        """Whether this run claims OGPSA."""
        return self.ogpsa.preset != "off"

    @property
    def asks_initial_model(self) -> bool:
        """Whether the initial model says what is right on reference rows."""
        references = self.references
        return self.projects and (references.target == "initial" or references.answers == "own")

    @property
    def reference_rows(self) -> int:
        """Rows of every batch that are reference rows."""
        in_step = self.references.in_step
        if not self.projects or in_step is None:
            return 0
        return round(in_step.share * self.train.batch_size)

    @property
    def name(self) -> str:
        """The run directory's own name."""
        return PurePath(self.output_dir).name
