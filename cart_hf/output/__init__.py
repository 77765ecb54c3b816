"""The output folder: plain transformers loads it, and one rename makes it appear."""

from cart_hf.output.folder import WorkFolder, check_replaceable, check_target, write_folder
from cart_hf.output.unfinished import unfinished

__all__ = ["WorkFolder", "check_replaceable", "check_target", "unfinished", "write_folder"]
