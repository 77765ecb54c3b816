"""The plan: for every output tensor its inputs, its role, its rank and its place in the output file."""

from cart_hf.plan.build import make_plan
from cart_hf.plan.layout import Shard, lay_out
from cart_hf.plan.model import Group, HeadTensor, Plan, PlannedTensor, Role

__all__ = ["Group", "HeadTensor", "Plan", "PlannedTensor", "Role", "Shard", "lay_out", "make_plan"]
