"""A federation over the network: keys, gateway, operator and sites."""
