"""`python -m uora_vision plan timm/vit_base_patch16_224`: what would be adapted in a model, without its weights."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import nn

from . import UoraConfig, UoraError, plan


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m uora_vision", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("plan", help="show what inject() would adapt")
    show.add_argument("model", help="timm/NAME, open_clip/NAME, or transformers/FOLDER (with a config.json)")
    show.add_argument("--targets", default="+".join(UoraConfig().targets), help="as for inject (%(default)s)")
    show.add_argument("--exclude", default=(), help="as for inject")
    show.add_argument("--rank", type=int, default=UoraConfig().rank, help="as for inject (%(default)s)")
    show.add_argument("--json", action="store_true", help="print JSON instead of a table")
    show.add_argument("--diff", action="store_true", help="run the model on the meta device and compare with the rules")
    given = parser.parse_args(arguments)
    try:
        model, example = _build(given.model)
        what = plan(
            model,
            rank=given.rank,
            targets=given.targets,
            exclude=given.exclude,
            example_input=example if given.diff else None,
        )
    except (UoraError, ImportError, LookupError, OSError, RuntimeError, ValueError) as error:
        text = str(error.args[0] if isinstance(error, KeyError | RuntimeError) and error.args else error)
        print(f"error: {text.splitlines()[0] if text else repr(error)}", file=sys.stderr)
        return 2
    print(what.to_json() if given.json else what)
    return 0


def _build(spec: str) -> tuple[nn.Module, Any]:
    """A model on the meta device, and an input for it."""
    library, _, name = spec.partition("/")
    with torch.device("meta"):
        if library == "timm":
            import timm

            model: Any = timm.create_model(name)
            return model, torch.empty(1, *model.pretrained_cfg["input_size"])
        if library == "open_clip":
            import open_clip

            model = open_clip.create_model(name, device="meta")
            size, length = model.visual.image_size, getattr(model, "context_length", 77)
            sides = size if isinstance(size, tuple) else (size, size)
            return model, (torch.empty(1, 3, *sides), torch.zeros(1, length, dtype=torch.int64))
        if library == "transformers":
            import transformers

            config = transformers.AutoConfig.from_pretrained(name)
            causal = any("CausalLM" in made for made in config.architectures or ())
            auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
            model = auto.from_config(config)
            tokens = torch.zeros(1, 8, dtype=torch.int64)
            if model.main_input_name == "pixel_values":
                return model, {"pixel_values": torch.empty(1, 3, config.image_size, config.image_size)}
            return model, {"input_ids": tokens} | ({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})
    raise ValueError(f"{spec!r} is not of the form timm/NAME, open_clip/NAME or transformers/FOLDER")


if __name__ == "__main__":
    sys.exit(main())
