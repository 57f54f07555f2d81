"""How the small ViT is pretrained; see `pretrain_vit.py`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import timm
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
from common.data.images import load_images, parse_classes


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random crop after 4 pixels of reflection, and a random flip: (n, 3, s, s) -> (n, 3, s, s)."""
    n, _, size, _ = images.shape
    padded = nn.functional.pad(images, (4, 4, 4, 4), mode="reflect")
    top = torch.randint(0, 9, (n, 1), generator=generator) + torch.arange(size)
    left = torch.randint(0, 9, (n, 1), generator=generator) + torch.arange(size)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    left = torch.where(flip, left.flip(1), left)
    index = torch.arange(n)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    hits = sum(
        (model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(256), labels.split(256), strict=True)
    )
    return 100 * hits / len(labels)


def pretrain(
    data: Path,
    output: Path,
    classes: str,
    epochs: int,
    full_epochs: int,
    width: int,
    depth: int,
    batch: int,
    lr: float,
    weight_decay: float,
    patch_drop: float,
    seed: int,
) -> None:
    """Train, going on from a checkpoint in `output` where there is one, and write the model there."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    train = load_images(str(data), "train", classes=parse_classes(classes))
    test = load_images(str(data), "test", classes=parse_classes(classes))
    mean, std = torch.tensor([0.5071, 0.4866, 0.4409]), torch.tensor([0.2673, 0.2564, 0.2762])

    def to_float(images: torch.Tensor) -> torch.Tensor:
        return (images.float().div_(255) - mean[:, None, None]) / std[:, None, None]

    x, y = torch.from_numpy(train.images).permute(0, 3, 1, 2), torch.from_numpy(train.labels)
    test_x, test_y = to_float(torch.from_numpy(test.images).permute(0, 3, 1, 2)), torch.from_numpy(test.labels)

    model_args = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": width,
        "depth": depth,
        "num_heads": width // 64,
        "class_token": False,
        "global_pool": "avg",
    }
    model = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=len(train.names),
        patch_drop_rate=patch_drop,
        drop_path_rate=0.05,
        **model_args,
    )
    optimizer = create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98))
    steps_per_epoch = len(x) // batch
    total = epochs * steps_per_epoch
    scheduler = CosineLRScheduler(
        optimizer, t_initial=total, warmup_t=steps_per_epoch, warmup_lr_init=1e-6, lr_min=1e-6
    )
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)

    history, done, started = [], 0, time.time()
    checkpoint = output / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        history, done = state["history"], state["epoch"]
    output.mkdir(parents=True, exist_ok=True)

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    ) as bar:
        task = bar.add_task("pretraining", total=total, completed=done * steps_per_epoch)
        for epoch in range(done, epochs):
            if epoch >= epochs - full_epochs:
                model.patch_drop = nn.Identity()
            model.train()
            order = torch.randperm(len(x), generator=generator)
            running = 0.0
            for step in range(steps_per_epoch):
                scheduler.step_update(epoch * steps_per_epoch + step)
                scheduler.step(epoch * steps_per_epoch + step)
                pick = order[step * batch : (step + 1) * batch]
                loss = loss_fn(model(augment(to_float(x[pick]), generator)), y[pick])
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                running += loss.item()
                bar.update(task, advance=1, description=f"epoch {epoch + 1}/{epochs} loss {running / (step + 1):.3f}")
            reached = accuracy(model, test_x, test_y)
            entry = {"epoch": epoch + 1, "loss": running / steps_per_epoch, "test_accuracy": reached}
            history.append(entry | {"seconds": time.time() - started})
            bar.console.print(json.dumps(history[-1]))
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"generator": generator.get_state(), "history": history, "epoch": epoch + 1}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)

    model.pretrained_cfg.update(
        num_classes=len(train.names),
        tag="cifar60",
        mean=mean.tolist(),
        std=std.tolist(),
        crop_pct=1.0,
        label_names=list(train.names),
    )
    timm.models.save_for_hf(model.half(), output, model_config={"model_args": model_args}, safe_serialization=True)
    (output / "history.json").write_text(json.dumps(history, indent=1) + "\n")
    checkpoint.unlink()
