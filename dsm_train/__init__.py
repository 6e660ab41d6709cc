"""dsm: the DeepSeekMath recipe as a Megatron-core trainer."""

__version__ = "0.1.0"
