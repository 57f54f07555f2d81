"""Which modules of a model are heads or turn features into logits over a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from ..weights.role import ATTENTION
from .paths import joined, lies_within


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
    words = {len(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    return tuple(
        name for name, module in modules.items()
        if name and (module is output or (name.rpartition(".")[2] in _OUTPUTS and _rows(module) in words))
    )  # fmt: skip


_OUTPUTS = ("lm_head", "embed_out")


def _rows(module: nn.Module) -> int:
    """How many outputs a layer has. Those of a CTC model's lm_head are no words of an embedding: it is a head."""
    weight = module._parameters.get("weight")
    return 0 if weight is None else int(getattr(module, "out_features", len(weight)))


class Parts(NamedTuple):
    """What a model has besides its base.

    Args:
        heads: paths of modules and parameters that are no part of a pretrained base: they train with `train="head"`.
        new: paths of what looks new, but may as well be pretrained: named, and trained where `train` says so.
        outputs: paths of what turns features into logits over a vocabulary.
    """

    heads: tuple[str, ...]
    new: tuple[str, ...]
    outputs: tuple[str, ...]


def find_parts(
    model: nn.Module, modules: Mapping[str, nn.Module], kinds: Mapping[str, str], blocks: Mapping[str, str | None]
) -> Parts:
    """Tell heads from the base. A base is a model of timm, transformers, open_clip or torchvision; around one, all is
    new. In other models only customary names tell, and that something comes after the last block.

    Args:
        modules: of the model, by path.
        kinds: the group of each weight that a rule knows, by path.
        blocks: the path of the numbered module around each, None outside of blocks.
    """
    roots = [p for p, m in modules.items() if _is_base(m)]
    # A base inside of a base is a part of it: what is called `head` in a tower of SigLIP pools and is pretrained.
    roots = [p for p in roots if not any(p != other and (not other or lies_within(p, (other,))) for other in roots)]
    heads, outputs = [*head_names(model, modules)], [*output_names(model, modules)]
    new: list[str] = []
    for root in roots:
        within = {p[len(root) :].lstrip("."): m for p, m in modules.items() if lies_within(p, (root,)) or not root}
        base, own = modules[root], output_names(modules[root], within)
        outputs += [joined(root, p) for p in own]
        heads += [joined(root, p) for p in head_names(base, within)]
        body = getattr(base, getattr(base, "base_model_prefix", "") or " ", None)
        if isinstance(body, nn.Module) and body is not base and not own:
            inner = next(p for p, m in within.items() if m is body)
            _sort(root, base, within, (joined(root, inner),), kinds, heads, new)
    if roots and "" not in roots:
        _sort("", model, modules, tuple(roots), kinds, heads, new)
    outputs += [head for head in heads if any(lies_within(path, (head,)) for path in outputs)]
    heads = [p for p in dict.fromkeys(heads) if not lies_within(p, tuple(outputs))]
    if not roots:
        new += _behind(kinds, blocks, (*heads, *outputs))
    return Parts(tuple(heads), tuple(p for p in dict.fromkeys(new) if not lies_within(p, heads)), tuple(outputs))


def _is_base(module: nn.Module) -> bool:
    if isinstance(getattr(module, "pretrained_cfg", None), dict):
        return True
    for cls in type(module).__mro__:
        package = cls.__module__
        if cls.__name__ == "PreTrainedModel" and package.startswith("transformers."):
            return True
        if package.startswith(("torchvision.models.", "open_clip.")) and any(True for _ in module.children()):
            return True
    return False


def _sort(
    path: str,
    module: nn.Module,
    modules: Mapping[str, nn.Module],
    bases: tuple[str, ...],
    kinds: Mapping[str, str],
    heads: list[str],
    new: list[str],
) -> None:
    """Divide what is in a module beside some bases: into heads and, where attention is in it, into what may have been
    pretrained itself."""
    heads += [joined(path, name) for name, p in module._parameters.items() if p is not None]
    for name, child in module.named_children():
        inner = joined(path, name)
        if lies_within(inner, bases) or not any(True for _ in child.parameters()):
            continue
        if any(lies_within(base, (inner,)) for base in bases):
            _sort(inner, child, modules, bases, kinds, heads, new)
        elif any(kind == ATTENTION and lies_within(weight, (inner,)) for weight, kind in kinds.items()):
            new.append(inner)
        else:
            heads.append(inner)


def _behind(kinds: Mapping[str, str], blocks: Mapping[str, str | None], known: tuple[str, ...]) -> list[str]:
    """What comes after the last block of a model that nobody knows, with a layer of its own. Blocks have attention,
    if any has; two layers alone behind them are a head, several pairs are blocks too, and so is what stands in a list
    of modules where others with the same weights alternate with attention."""
    paths = list(blocks)
    attending = {b for p, b in blocks.items() if b and kinds.get(p) == ATTENTION}
    real = sorted(attending or {b for b in blocks.values() if b})
    last = max((i for i, p in enumerate(paths) if blocks[p] in real), default=len(paths))
    tops = dict.fromkeys(_top(p, real) for p in paths[last + 1 :] if not lies_within(p, known))
    before = paths[:last]
    return [
        top for top in tops
        if len({b for b in blocks.values() if b and lies_within(b, (top,))}) < 2 and not _alternates(top, paths, before)
    ]  # fmt: skip


def _alternates(path: str, paths: list[str], before: list[str]) -> bool:
    """Whether a numbered module has the weights of a sibling that comes before the last block."""
    parent, _, number = path.rpartition(".")
    if not number.isdigit():
        return False

    def held(module: str, within: list[str]) -> set[str]:
        return {p[len(module) :] for p in within if lies_within(p, (module,))}

    own = held(path, paths)
    return any(held(joined(parent, str(i)), before) == own for i in range(int(number)))


def _top(path: str, blocks: list[str]) -> str:
    """The largest module around a weight that holds no block."""
    parts = path.split(".")
    tops = (".".join(parts[:i]) for i in range(1, len(parts)))
    return next((top for top in tops if not any(lies_within(block, (top,)) for block in blocks)), path)


def matching(terms: Iterable[str], names: Iterable[str]) -> dict[str, list[str]]:
    """Names that are a term, or fit it as a pattern, by term."""
    names = list(names)
    return {term: [name for name in names if name and (name == term or fnmatchcase(name, term))] for term in terms}
