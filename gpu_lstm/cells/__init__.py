"""The equations of the cells, in torch's operators."""
