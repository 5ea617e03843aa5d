"""Checkpoints by their name on the Hugging Face hub: ``REPO`` or ``REPO:FILE``, from the local cache or the network.

huggingface_hub does the work: its cache, its resumed downloads, its progress bars, its environment variables (HF_HOME,
HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import fnmatch
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ds4.errors import Ds4Error

# What a checkpoint consists of; everything else in a repository (pictures, evaluation results) stays there.
_CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.gguf", "tokenizer*", "*.model", "*.jinja"]
# Which one huggingface_hub uses has changed; their connection errors have no base class in common.
_HTTP_LIBRARIES = {"requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2"}
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
_REPO = r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(rf"(?P<repo>{_REPO})(?:@(?P<revision>[^:\s]+))?(?::(?P<file>[^:\\\s][^:\\]*))?")


@dataclass(frozen=True)
class HubName:
    """``REPO[@REVISION][:FILE]``: a repository, and a file in it or a pattern such as ``*Q2_K*.gguf``."""

    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return self.repo + revision + (f":{self.file}" if self.file else "")


def parse(name: str) -> HubName | None:
    """The hub name in a text, or None if it does not look like one."""
    match = _NAME.fullmatch(name)
    if match is None or ".." in (match["file"] or "").split("/"):
        return None
    return HubName(match["repo"], match["file"], match["revision"])


def local_path(name: str | os.PathLike[str]) -> Path:
    """Where a checkpoint given as a path or as a hub name lies on this machine; nothing is downloaded.

    An existing file or directory wins over a hub name of the same spelling.
    Error:   Ds4Error for a name that is neither; where a download would help, it says how.
    """
    path = Path(name).expanduser()
    hub_name = None if path.exists() else parse(os.fspath(name))
    if hub_name is None:
        return path  # whether it exists is the opener's business
    cached = _cached(hub_name)
    if cached is None:
        raise Ds4Error(f"{name}: no such file, and not in the local hub cache; get it with 'ds4 pull {name}'")
    return cached


def pull(name: HubName) -> Path:
    """Download what of ``name`` is missing in the local cache, and say where it lies.

    A connection that breaks is taken up again where it broke, and files that are complete are not fetched again. A part
    of a split GGUF brings the other parts along.
    Error:   Ds4Error, one line: no network, no such repository, revision or file, no access, several GGUF files to
             choose from.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        siblings = hub.HfApi().model_info(name.repo, revision=name.revision).siblings or []
        wanted = _wanted(name, [file.rfilename for file in siblings])
        folder = Path(hub.snapshot_download(name.repo, revision=name.revision, allow_patterns=wanted))
    except errors.GatedRepoError:
        raise Ds4Error(f"{name.repo}: the repository asks for permission; accept its terms and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise Ds4Error(f"{name.repo}: no such repository on the hub, or a private one (set HF_TOKEN)") from None
    except errors.RevisionNotFoundError:
        raise Ds4Error(f"{name.repo}: has no revision {name.revision!r}") from None
    except errors.HFValidationError as error:
        raise Ds4Error(f"{name}: is not a name on the hub: {str(error).splitlines()[0]}") from None
    except errors.OfflineModeIsEnabled:
        raise Ds4Error(f"{name}: cannot be downloaded while HF_HUB_OFFLINE is set") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        raise Ds4Error(f"{name}: the download failed: {_reason(error)}; run the command again") from None
    except OSError as error:  # a full disk, and with some releases of the HTTP library no network
        raise Ds4Error(f"{name}: cannot be downloaded: {_reason(error)}") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _HTTP_LIBRARIES:
            raise
        raise Ds4Error(
            f"{name}: the hub cannot be reached ({_reason(error)}); check the network and run the command again"
        ) from None
    return _checkpoint_in(folder, wanted)


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _wanted(name: HubName, files: list[str]) -> list[str]:
    """The files of a repository that make up the checkpoint ``name``."""
    if name.file is not None:
        found = [file for file in files if file == name.file] or fnmatch.filter(files, name.file)
        parts = [file for file in files if any(_same_set(file, other) for other in found)]
        if not found:
            ggufs = [file for file in files if file.endswith(".gguf")]
            raise Ds4Error(f"{name.repo}: has no file {name.file!r}{_choice(ggufs or files)}")
        if len(parts) < len(found) or len({_set_name(file) for file in found}) > 1:
            raise Ds4Error(f"{name}: stands for {len(found)} files{_choice(found)}")
        return parts
    wanted = [file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in _CHECKPOINT_FILES)]
    if any(file.endswith(".safetensors") and "/" not in file for file in wanted):
        return [file for file in wanted if not file.endswith(".gguf")]
    ggufs = [file for file in wanted if file.endswith(".gguf")]
    if not ggufs:
        raise Ds4Error(f"{name.repo}: holds no checkpoint (no *.safetensors, no *.gguf)")
    if len({_set_name(file) for file in ggufs}) > 1:
        raise Ds4Error(f"{name.repo}: has several GGUF files; name one as {name.repo}:FILE{_choice(ggufs)}")
    return ggufs


def _set_name(file: str) -> str:
    """A split GGUF without its number, any other file as it is."""
    match = _PART.fullmatch(file)
    return f"{match[1]}-of-{match[3]}" if match else file


def _same_set(file: str, other: str) -> bool:
    return _set_name(file) == _set_name(other)


def _choice(files: list[str]) -> str:
    """ "; choose from: a, b and 3 more", or nothing."""
    if not files:
        return ""
    shown = sorted(dict.fromkeys(files))
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return f"; choose from: {', '.join(shown[:4])}{more}"


def _checkpoint_in(folder: Path, wanted: list[str]) -> Path:
    """What to open: a GGUF file (of several parts: the first), or the folder of safetensors."""
    ggufs = sorted(file for file in wanted if file.endswith(".gguf"))
    if ggufs:
        return folder / ggufs[0]
    return folder / wanted[0] if len(wanted) == 1 else folder


def _cached(name: HubName) -> Path | None:
    """Where a checkpoint lies in the local cache, or None."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        repos = [r for r in hub.scan_cache_dir().repos if r.repo_id == name.repo and r.repo_type == "model"]
    except errors.CacheNotFound:
        return None
    wanted = name.revision or "main"
    for revision in (r for repo in repos for r in repo.revisions):
        if wanted not in revision.refs and not revision.commit_hash.startswith(wanted):
            continue
        folder = Path(revision.snapshot_path)
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        try:
            return _checkpoint_in(folder, _wanted(name, files))
        except Ds4Error:
            return None  # other files of the repository are there
    return None
