"""Packing: sequences to micro-batches of even cost, in which a group's prompt stands once."""
