"""Data sets from the Hugging Face hub, for users who have it: one file, kept in the hub's own cache."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from everedit.data.dataset import DataSet
from everedit.errors import EditError

__all__ = ["fetched"]


def fetched(name: str, known: DataSet) -> Path:
    """Return the path of a data set's file, downloaded unless it is in the cache.

    Raises :class:`EditError` if it is not on the hub, the hub cannot be reached, or the file is not there.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    if not known.hub:
        raise EditError(
            what=f"no copy of '{name}' in the form that its loader reads is known on the Hugging Face hub",
            fix=f"give its file or folder: --data-path (usual names: {', '.join(known.files)})",
        )
    owner, repository, pattern = known.hub.split("/", 2)
    place = f"{owner}/{repository}"
    try:
        names = HfApi().list_repo_files(place, repo_type="dataset") if "*" in pattern else [pattern]
        file = next((name for name in sorted(names) if fnmatch(name, pattern)), pattern)
        return Path(hf_hub_download(place, file, repo_type="dataset"))
    except (OSError, HTTPError, HFValidationError) as error:
        raise EditError(
            what=f"the hub does not give '{name}': {str(error).strip().partition(chr(10))[0]}",
            where=known.hub,
            fix="check the network, or download it elsewhere and give --data-path",
        ) from error
