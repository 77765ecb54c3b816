"""One HTML page about an analysis: everything is in the file, and nothing is loaded."""

from cart_hf.analysis.page.render import write_page

__all__ = ["write_page"]
