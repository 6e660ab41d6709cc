"""Responses to packed micro-batches of even cost."""
