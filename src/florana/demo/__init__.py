"""The offline demonstration: real text and real pretrained weights, nothing downloaded."""
