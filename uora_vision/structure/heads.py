"""Which modules of a model are heads or turn features into logits over a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .paths import lies_within


def head_names(model: nn.Module, modules: Mapping[str, nn.Module] | None = None) -> tuple[str, ...]:
    """Paths of the modules that turn features into predictions, which are trained with the adapter: what timm calls the
    classifier, or a last module of a customary name. An attention pool (of CLIP's ResNets) is not a head but for its
    last projection.

    Args:
        modules: of the model, by path, where they are known already.
    """
    config = getattr(model, "pretrained_cfg", None)
    named = config.get("classifier") if isinstance(config, dict) else None
    names = [named] if isinstance(named, str) else list(named or ())
    names += [name for name in _HEADS if name not in names]
    present = dict(model.named_modules()) if modules is None else modules
    kept: list[str] = []
    for name in names:
        if name not in present or any(lies_within(name, (other,)) for other in kept):
            continue
        if {"proj"} < {child for child, _ in present[name].named_children()} & {"q", "qkv", "proj"}:
            name = f"{name}.proj"
        kept = [other for other in kept if not lies_within(other, (name,))] + [name]
    outputs = output_names(model, present)
    return tuple(name for name in kept if name not in outputs and any(True for _ in present[name].parameters()))


_HEADS = (
    "head", "head_dist", "heads", "heads_dist", "aux_head", "fc", "classifier", "classif", "last_linear", "score",
    "qa_outputs", "cls", "cls_classifier", "distillation_classifier",
)  # fmt: skip


def output_names(model: nn.Module, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Paths of the modules that turn features into logits over a vocabulary. They are as large as the embedding, with
    which they are often tied, so they are neither adapted nor trained.

    Args:
        modules: of the model, by path.
    """
    get = getattr(model, "get_output_embeddings", None)
    output = get() if callable(get) else None
    return tuple(
        name for name, module in modules.items()
        if name and (module is output or name.rpartition(".")[2] in ("lm_head", "embed_out"))
    )  # fmt: skip
