"""What the sources of a merge say of themselves: licence, languages, training data, and whether they are private."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_TIMEOUT = 10.0  # seconds for each question


@dataclass(frozen=True)
class Origin:
    """What is known of a source from its model card, and from the Hub.

    :param private: whether only some may see it; None for a local folder, and when the Hub did not say.
    :param license: its licence as its card names it; None when that is not known.
    :param license_name, license_link: which licence, where ``license`` is ``other``.
    :param language: the languages that its card names.
    :param datasets: the data sets it was trained on, as Hub ids.
    """

    private: bool | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return what ``merge.json`` holds: what is known."""
        return {key: value for key, value in asdict(self).items() if value not in (None, ())}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Origin:
        """Read what :meth:`to_dict` returned."""
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return cls(**fields)


def origins(repositories: Sequence[tuple[str, str | None]], token: str | None = None) -> list[Origin]:
    """Ask the Hub for what it knows of repositories, weights unread.

    What cannot be found out stays unknown: a finished merge must not fail for it. A Hub that does not answer is asked
    once.

    :param repositories: Hub ids and commits.
    """
    if not repositories:
        return []  # the client takes a while to load
    from huggingface_hub import HfApi, errors, is_offline_mode

    api = HfApi(library_name="cart-hf", token=token)
    reachable = not is_offline_mode()
    found = []
    for name, commit in repositories:
        origin = Origin()
        if reachable:
            try:
                info = api.model_info(name, revision=commit, timeout=_TIMEOUT)
                origin = _of_card(info.card_data, private=bool(info.private))
            except errors.HfHubHTTPError:
                pass
            except Exception:  # no connection, in the words of whichever HTTP client is installed
                reachable = False
        found.append(origin)
    return found


def local_origin(folder: Path) -> Origin:
    """Read what a local folder's card says."""
    path = folder / "README.md"
    if not path.is_file():
        return Origin()
    from huggingface_hub import ModelCard

    try:
        return _of_card(ModelCard.load(path, ignore_metadata_errors=True).data)
    except Exception:  # whatever a stranger's file holds
        return Origin()


def _of_card(data: Any, private: bool | None = None) -> Origin:
    def words(key: str) -> tuple[str, ...]:
        value = data.get(key) if data else None
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(str(word) for word in values if word)

    def word(key: str) -> str | None:
        return next(iter(words(key)), None)

    return Origin(
        private,
        word("license"),
        word("license_name"),
        word("license_link"),
        words("language"),
        tuple(name for name in words("datasets") if _is_hub_id(name)),
    )


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
