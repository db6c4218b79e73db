"""The configuration of a run: all of its sections, and the combinations that are refused.

Unknown keys are refused. A preset sets the keys that the configuration does not set, so a
resolved configuration is explicit and round-trips. Combinations without a meaning are refused.
"""

from pathlib import PurePath
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from ogpsa_jax.config.origin import Origin
from ogpsa_jax.config.presets import fill_in_preset
from ogpsa_jax.config.sections import (
    DataSection,
    DpoSection,
    ExportSection,
    MeshSection,
    ModelSection,
    OgpsaSection,
    OptimizerSection,
    ReferencesSection,
    Section,
    TrainSection,
)
from ogpsa_jax.objectives.dpo import REFERENCE_FREE


class RunConfig(Section):
    """One stage of fine-tuning."""

    objective: Literal["sft", "dpo"] = Field("sft", description="what is minimised")
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    references: ReferencesSection = Field(default_factory=ReferencesSection)
    ogpsa: OgpsaSection
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
        return fill_in_preset(raw)

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.projects and not self.references.sets:
            raise ValueError(
                "references.sets is empty, so nothing can be projected: name a "
                "reference set, or set ogpsa.preset to off"
            )
        if self.optimizer.stochastic_rounding and self.model.param_dtype != "bfloat16":
            raise ValueError(
                "optimizer.stochastic_rounding is for model.param_dtype: bfloat16, not "
                f"{self.model.param_dtype}"
            )
        if self.data.max_length % self.mesh.context:
            raise ValueError(
                f"mesh.context: {self.mesh.context} does not divide data.max_length, "
                f"{self.data.max_length}; choose a divisor"
            )
        if self.projects:
            self._check_subspace()
            self._check_refresh()
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
            if in_step.window is not None and not spans_gradients:
                raise ValueError(
                    "references.in_step.window: a subspace of inputs is spanned once and remembers "
                    "no gradients; set it to null"
                )
            if in_step.replay_weight and spans_gradients and self.ogpsa.placement != "gradient":
                raise ValueError(
                    "references.in_step.replay_weight: a projected update cannot keep the replayed "
                    "gradient; set it to 0, or ogpsa.placement to gradient"
                )
        return self

    def _check_refresh(self) -> None:
        section, refresh = self.references, self.ogpsa.refresh
        if self.ogpsa.subspace == "inputs":
            if refresh is not None:
                raise ValueError(
                    "ogpsa.refresh: a subspace of inputs is spanned once, before training; set it "
                    "to null, or ogpsa.preset to paper"
                )
        elif refresh is None and section.in_step is None:
            raise ValueError(
                "ogpsa.refresh: nothing says when the basis is spanned; set it, to {every: 30}, "
                "say, or references.in_step"
            )
        elif refresh is not None and section.in_step is not None:
            raise ValueError(
                "ogpsa.refresh: nothing is refreshed at intervals where every step takes a "
                "reference batch; set it or references.in_step to null"
            )
        rows, unit = section.rows_per_refresh, section.batch_size * len(section.sets)
        if rows is None:
            return
        if refresh is None:
            raise ValueError(
                "references.rows_per_refresh: nothing is refreshed at intervals here; leave it "
                "out, or set ogpsa.refresh"
            )
        if rows % unit:
            raise ValueError(
                f"references.rows_per_refresh: {rows} is not a multiple of references.batch_size "
                f"times the number of sets ({unit}); take {-(-rows // unit) * unit}"
            )

    def _check_subspace(self) -> None:
        ogpsa = self.ogpsa
        if ogpsa.subspace == "gradients":
            if ogpsa.rank > 64:
                raise ValueError(
                    f"ogpsa.rank: {ogpsa.rank} gradients do not fit, 64 at most; for a span of "
                    "gradients set ogpsa.preset to paper or in-step"
                )
            for name in ("energy", "others"):
                if getattr(ogpsa, name) is not None:
                    raise ValueError(
                        f"ogpsa.{name} needs ogpsa.subspace: inputs; set it to null, or "
                        "ogpsa.preset to recommended"
                    )
            return
        for name in ("energy", "others"):
            if getattr(ogpsa, name) is None:
                raise ValueError(
                    f"ogpsa.{name}: a subspace of inputs needs it; set it, or ogpsa.preset to "
                    "recommended"
                )
        if ogpsa.project_momentum:
            raise ValueError(
                "ogpsa.project_momentum needs ogpsa.subspace: gradients; set it to false"
            )
        for name, plain in (("scope", "tensor"), ("scale", 1.0)):
            if getattr(ogpsa, name) != plain:
                raise ValueError(
                    f"ogpsa.{name} needs ogpsa.subspace: gradients; leave it at {plain}"
                )
        if self.references.target == "initial" and not self.differentiates_references:
            raise ValueError(
                "references.target: with a subspace of inputs no loss of the references is taken; "
                "set references.in_step to replay them, or leave target out"
            )
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
                "model.lora.adapter: what an adapter has learned already may lie in the subspace "
                "of inputs; merge it into the model first, or set ogpsa.preset to in-step"
            )

    @property
    def projects(self) -> bool:
        """Whether this run claims OGPSA."""
        return self.ogpsa.preset != "off"

    @property
    def refreshes(self) -> bool:
        """Whether the basis is refreshed at intervals."""
        return self.projects and self.ogpsa.refresh is not None

    @property
    def differentiates_references(self) -> bool:
        """Whether a loss of the reference rows is taken; the inputs of layers need none."""
        gradients = self.ogpsa.subspace == "gradients"
        return self.projects and (gradients or self.references.in_step is not None)

    @property
    def asks_initial_model(self) -> bool:
        """Whether the target on reference rows is the initial model's predictions."""
        predicts = self.references.target == "initial" and self.differentiates_references
        return predicts or (self.projects and self.references.answers == "own")

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
