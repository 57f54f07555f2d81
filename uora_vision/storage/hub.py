"""Adapters on the Hugging Face hub: the two files of a saved adapter, and a model card written from them.

Needs `huggingface_hub`, which is imported at the first use. Of a repository, only the adapter's two files are
downloaded, and nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError, FormatError, HubError
from ..tables import shortened
from .folder import CONFIG_FILE, TENSOR_FILE, folder_path, near, read_folder, write_folder
from .snapshot import collect
from .stored import Stored

CARD_FILE, METRICS_FILE = "README.md", "metrics.json"

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)

LONGEST = 96
"""Characters of the name of a repository."""


def push_to_hub(
    what: nn.Module | str | os.PathLike[str],
    repository: str,
    *,
    data: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload an adapter of uora_vision",
) -> str:
    """Upload an adapter in one commit, with a model card that says what it is and how to load it.

    Args:
        what: an injected model, of which the active adapter is taken, or a folder that `save` wrote.
        repository: `user/name`; it is made if there is none.
        data: what it was trained on, for the card.
        metrics: its results, for the card. Of a folder they are otherwise taken from a `metrics.json` in it or beside
            it, where the recipes put theirs.
        private: whether a new repository is.
        revision: branch to commit to.
        token: of the hub; the one of `hf auth login` otherwise.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        StateError: the model is not injected.
        FormatError: the folder holds no adapter that loads.
        ConfigError, OptionError: this can be no folder, or no repository.
        HubError: there is no huggingface_hub, no network, or no permission.

    Example:
        >>> import uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
        >>> url = uora.push_to_hub(model, "me/cats", data="Pets", metrics={"accuracy": 0.93})  # doctest: +SKIP
        >>> uora.push_to_hub("nowhere", "me/cats")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        uora_vision.errors.FormatError: nowhere/adapter_model.safetensors does not exist; ...
    """
    if isinstance(what, nn.Module):
        adapter = collect(what)
    else:
        adapter = read_folder(what)
        metrics = metrics if metrics is not None else _metrics_beside(Path(what))
    if not isinstance(repository, str) or len(repository) > LONGEST or not _REPOSITORY.fullmatch(repository):
        raise ConfigError(f"a repository of the hub is called user/name, got {repository!r:.120}")
    with _hub(repository) as hub, tempfile.TemporaryDirectory() as folder:
        write_folder(adapter, folder)
        (Path(folder) / CARD_FILE).write_text(card(adapter, repository, data, metrics), encoding="utf-8")
        api = hub.HfApi(token=token, library_name="uora_vision")
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, revision=revision, commit_message=message)
        return str(commit.commit_url)


def there(folder: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Where an adapter lies that is asked for: the folder, or a copy of the repository of that name. If there is a
    folder `user` here, it is one in that, unless a revision tells that the hub is meant.

    Raises:
        FormatError: there is no such folder in the folder `user`.
        ConfigError, OptionError: see `folder_path`.
        HubError: see `local_copy`.
    """
    path = folder_path(folder)
    if not is_repository(folder):
        return path
    if path.parent.exists() and revision is None:
        raise FormatError(
            f"there is no {path}{near(path)}; as there is a folder {path.parent} here, the hub is only asked for a "
            "repository of this name with a revision, such as main"
        )
    return local_copy(os.fspath(folder), revision)


def is_repository(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder that `load` is given may be the name of a repository: `user/name`, and no folder here."""
    if not isinstance(folder, str) or len(folder) > LONGEST:
        return False
    return _REPOSITORY.fullmatch(folder) is not None and not Path(folder).exists()


def local_copy(repository: str, revision: str | None = None) -> Path:
    """The folder into which an adapter was downloaded, from the cache if it is there. Both files are of one commit.

    Raises:
        HubError: there is no huggingface_hub, no network, no such repository, or no adapter in it.
    """
    with _hub(repository) as hub:
        api = hub.HfApi(library_name="uora_vision")
        url, offline = hub.hf_hub_url(repository, TENSOR_FILE, revision=revision, endpoint=api.endpoint), False
        try:  # one question; the download itself would ask for half a minute where there is no network
            revision = api.get_hf_file_metadata(url=url).commit_hash
        except hub.errors.HfHubHTTPError:
            raise
        except Exception:  # of its HTTP client, which differs by version
            offline = True
        path = Path(api.hf_hub_download(repository, TENSOR_FILE, revision=revision, local_files_only=offline))
        # A copy of what the other file says, but for adapters of version 2.
        with suppress(hub.errors.EntryNotFoundError):
            api.hf_hub_download(repository, CONFIG_FILE, revision=path.parent.name, local_files_only=offline)
        return path.parent


def card(adapter: Stored, repository: str, data: str | None = None, metrics: Mapping[str, Any] | None = None) -> str:
    """A model card in Markdown."""
    config, base = adapter.config, adapter.identity
    head = ["library_name: uora_vision", "tags: [uora, adapter]"]
    if base.name and _REPOSITORY.fullmatch(base.name):
        head.append(f"base_model: {json.dumps(base.name)}")
    roles = sorted({role.kind for p in adapter.projections for role in p.roles})
    count, trained = len(adapter.vector), sum(t.numel() for t in adapter.parts.values())
    rows = {
        "base": f"{_text(base.shown)} ({_text(base.class_name)})",
        "fingerprint of the base": base.fingerprint or "none",
        "adapted": f"{len(adapter.projections)} weights: {', '.join(map(_text, roles))}",
        "rank": f"{config.rank}, layout {config.layout}, drawn {config.init}, seed {config.seed}",
        "trained": f"{count:,} parameters of the adapter" + (f", {trained:,} of the base" if trained else ""),
        "directions redrawn": f"{sum(len(event.indices) for event in adapter.log):,}",
        "written by": ", ".join(f"{_text(name)} {_text(v)}" for name, v in sorted(adapter.versions.items())),
    }
    about, labels = adapter.about.get("preprocessing", {}), adapter.about.get("labels", [])
    if "task" in about:
        rows["task"] = _text(about["task"])
    if labels:
        rows["classes"] = f"{len(labels):,}: {shortened([_text(name) for name in labels], 20)}"
    if "input_size" in about:
        rows["images"] = " x ".join(map(str, about["input_size"][1:])) + " pixels"
    if data:
        rows["data"] = _text(data)
    lines = ["---", *head, "---", "", f"# {_text(repository)}", ""]
    lines += ["A UORA adapter ([ACL 2025](https://arxiv.org/abs/2505.20154)) for uora_vision.", ""]
    lines += _table(("", ""), rows)
    found = {name: value for name, value in (metrics or {}).items() if isinstance(value, int | float | str)}
    if found:
        lines += ["", "## Results", "", *_table(("metric", "value"), {_text(n): _text(v) for n, v in found.items()})]
    use = [f"model = ...  # {_line(base.shown)}, with its pretrained weights", f'uora.load(model, "{repository}")']
    if "task" in about:
        here = "" if "model" in about and "/." not in about["model"] and ":." not in about["model"] else ", model=..."
        use = [f'predictor = uora.load_predictor("{repository}"{here})', "print(predictor(...).answer)"]
    lines += ["", "## Use", "", "```python", "import uora_vision as uora", "", *use, "```", ""]
    return "\n".join(lines)


def _metrics_beside(folder: Path) -> dict[str, Any]:
    for path in (folder / METRICS_FILE, folder.parent / METRICS_FILE):
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return {}


@contextmanager
def _hub(repository: str) -> Iterator[Any]:
    """The library of the hub; its errors as one sentence of ours."""
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise HubError(
            f"{repository} is not a folder here, and the hub needs huggingface_hub: pip install huggingface_hub"
        ) from error
    try:
        yield hub
    except HubError:
        raise
    except hub.errors.EntryNotFoundError as error:
        if isinstance(error, hub.errors.LocalEntryNotFoundError):
            raise _unreachable(repository, hub) from error
        raise HubError(f"{repository} on {_endpoint(hub)} holds no {TENSOR_FILE}: it is no adapter") from error
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as error:
        raise HubError(
            f"{repository} is neither a folder here nor a repository (or revision) that can be seen on "
            f"{_endpoint(hub)}; for a private one, run `hf auth login`"
        ) from error
    except hub.errors.HfHubHTTPError as error:
        raise HubError(f"{_endpoint(hub)} refused {repository}: {_line(error)}") from error
    except Exception as error:  # the library lets errors of its HTTP client through, which differ by its version
        if isinstance(error, OSError | ValueError) or type(error).__module__.partition(".")[0] in _CLIENTS:
            raise _unreachable(repository, hub, error) from error
        raise


_CLIENTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3", "huggingface_hub")


def _unreachable(repository: str, hub: Any, error: object = "") -> HubError:
    reason = f" ({_line(error)})" if str(error) else ""
    return HubError(
        f"{repository} is not a folder here, and {_endpoint(hub)} cannot be reached{reason}; check the network, or "
        "load the adapter from a folder"
    )


def _endpoint(hub: Any) -> str:
    return str(hub.constants.ENDPOINT)


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _text(value: object) -> str:
    """Of a name or value that others chose: one line that is no Markdown and no HTML."""
    shown = f"{value:.4g}" if isinstance(value, float) else _line(value)
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", shown)


def _line(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:197]}..."
