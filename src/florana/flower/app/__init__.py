"""A recipe as a Flower app: the same rounds, with messages over Flower's grid."""
