"""The loop: for each planned tensor read, place on a device, call the method, write in place."""

from cart_hf.merging.device import choose_device
from cart_hf.merging.loop import default_workers, run
from cart_hf.merging.parallel import Progress, cores

__all__ = ["Progress", "choose_device", "cores", "default_workers", "run"]
