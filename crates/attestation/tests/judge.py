"""Verifies attestation documents with libraries that share nothing with Nitroxide: cbor2 and cryptography.

Each line of standard input: document, root (both files), milliseconds since 1970. Each line of output: the module id, or what is wrong.
"""

import datetime
import sys

import cbor2
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

FIELDS = ["module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle", "public_key", "user_data", "nonce"]


def check(condition, what):
    if not condition:
        raise ValueError(what)


def extension(certificate, kind):
    return certificate.extensions.get_extension_for_class(kind)


def judge(document, root, at):
    parts = cbor2.loads(document)
    check(type(parts) is list and len(parts) == 4, "no COSE_Sign1 without a tag")
    protected, unprotected, payload, signature = parts
    check(cbor2.loads(protected) == {1: -35} and unprotected == {}, "headers")
    content = cbor2.loads(payload)
    check(list(content) == FIELDS, "fields or their order")
    check(content["digest"] == "SHA384", "digest")
    check(all(len(value) == 48 for value in content["pcrs"].values()), "registers")
    check(content["cabundle"][0] == root, "another root")
    chain = [x509.load_der_x509_certificate(der) for der in content["cabundle"] + [content["certificate"]]]
    chain[0].verify_directly_issued_by(chain[0])
    for above, certificate in zip(chain, chain[1:]):
        certificate.verify_directly_issued_by(above)
    for number, certificate in enumerate(chain):
        check(certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc, f"period of {number}")
        check(isinstance(certificate.public_key().curve, ec.SECP384R1), f"curve of {number}")
        check(isinstance(certificate.signature_hash_algorithm, hashes.SHA384), f"hash of {number}")
        constraints, usage = extension(certificate, x509.BasicConstraints), extension(certificate, x509.KeyUsage).value
        is_leaf = number == len(chain) - 1
        check(constraints.critical and constraints.value.ca is not is_leaf, f"constraints of {number}")
        below = len(chain) - 2 - number
        check(is_leaf or constraints.value.path_length is None or constraints.value.path_length >= below, f"path length of {number}")
        check(usage.digital_signature if is_leaf else usage.key_cert_sign, f"usage of {number}")
        if 0 < number and not is_leaf:
            above = extension(chain[number - 1], x509.SubjectKeyIdentifier).value
            check(extension(certificate, x509.AuthorityKeyIdentifier).value.key_identifier == above.digest, f"issuer of {number}")
    names = chain[-1].subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    check(names[0].value.startswith(content["module_id"] + "."), "name of the leaf")
    check(len(signature) == 96, "length of the signature")
    r, s = (int.from_bytes(half, "big") for half in (signature[:48], signature[48:]))
    signed = cbor2.dumps(["Signature1", protected, b"", payload])
    chain[-1].public_key().verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA384()))
    return content["module_id"]


for line in sys.stdin:
    document, root, milliseconds = line.split()
    at = datetime.datetime.fromtimestamp(int(milliseconds) / 1000, datetime.timezone.utc)
    try:
        with open(document, "rb") as document, open(root, "rb") as root:
            print("good", judge(document.read(), root.read(), at), flush=True)
    except Exception as error:
        print("bad", type(error).__name__, error, flush=True)
