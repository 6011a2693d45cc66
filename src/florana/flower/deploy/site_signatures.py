"""A site's signatures in secure sums: by its node key, checked against the roster in its invitation."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_private_key

from florana.errors import InputError
from florana.flower.deploy.invitation import ROSTER, Invitation
from florana.flower.deploy.roster import read_roster
from florana.flower.deploy.signing import sign, signed_by
from florana.secure.identities import Signer


def signer_of(invitation: Invitation, who: str, key: Path) -> Signer:
    """The site's own signature, and the check of all others'.

    Args:
        invitation: the operator's, with the roster.
        who: the site's name.
        key: its private key, as `keys.read_private` found it.

    Raises:
        InputError: the invitation has no roster, or not this site's own key on it.
    """
    roster = read_roster(invitation.folder / ROSTER).keys
    private = load_ssh_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    publics = {name: load_pem_public_key(pem) for name, pem in roster.items()}
    own = publics.get(who)
    if not isinstance(own, ec.EllipticCurvePublicKey) or own.public_numbers() != private.public_key().public_numbers():
        raise InputError(
            f"the roster in {invitation.folder} does not have this site's key ('{who}')",
            why="with secure sums each site checks the others' keys, and they check this one's",
            fix="ask the operator to approve this site's .pub file, and for a new invitation",
        )

    def verify(name: str, content: bytes, signature: bytes) -> bool:
        return signed_by(publics.get(name), content, signature)

    return Signer(who, lambda content: sign(private, content), verify)
