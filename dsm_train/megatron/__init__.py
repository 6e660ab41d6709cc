"""Everything that touches megatron-core; no other package of the trainer imports it."""

from dsm_train.megatron import platform

platform.enable()

from dsm_train.megatron import fixes  # noqa: E402 (imports megatron-core, which must be adapted first)

fixes.apply()
