"""Everything that touches megatron-core; no other package of the trainer imports it."""

from dsm_train.megatron import platform

platform.enable()
