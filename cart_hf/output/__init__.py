"""The output folder: plain transformers loads it, and one rename makes it appear."""

from cart_hf.output.folder import WorkFolder, check_replaceable, check_target, write_folder

__all__ = ["WorkFolder", "check_replaceable", "check_target", "write_folder"]
