"""The test cluster's certificate authority: one key pair that signs the server's and every user's certificate.

In Kubernetes a client certificate *is* the identity: its common name is the user, its organisations the groups.
"""

import base64
import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_VALIDITY = datetime.timedelta(days=365)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes

    def write(self, folder: Path, name: str) -> None:
        """Write `name`.crt and `name`.key; only the owner can read the key."""
        (folder / f"{name}.crt").write_bytes(self.certificate)
        write_private(folder / f"{name}.key", self.key)


class CertificateAuthority:
    """Issues certificates; kept in `folder` as ca.crt and ca.key, so that a kept state keeps its identity."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.certificate_path = folder / "ca.crt"
        key_path = folder / "ca.key"
        if not key_path.exists():
            _new_authority().write(folder, "ca")
        self.certificate = self.certificate_path.read_bytes()
        self._issuer = x509.load_pem_x509_certificate(self.certificate)
        loaded = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        self._key = loaded

    def server(self, *, dns_names: list[str], addresses: list[str]) -> KeyPair:
        names: list[x509.GeneralName] = [x509.DNSName(name) for name in dns_names]
        names += [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(_name("kube-apiserver"), key, ExtendedKeyUsageOID.SERVER_AUTH)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return self._sign(builder, key)

    def client(self, user: str, *groups: str) -> KeyPair:
        key = ec.generate_private_key(ec.SECP256R1())
        return self._sign(self._builder(_name(user, *groups), key, ExtendedKeyUsageOID.CLIENT_AUTH), key)

    def kubeconfig(self, server: str, user: str, *groups: str) -> str:
        """A kubeconfig, as YAML, that logs in at `server` as `user` in `groups`; it names no other file."""
        pair = self.client(user, *groups)
        login = {"client-certificate-data": _base64(pair.certificate), "client-key-data": _base64(pair.key)}
        return kubeconfig(server, self.certificate, login)

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, usage: x509.ObjectIdentifier
    ) -> x509.CertificateBuilder:
        authority_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            _unsigned(subject, self._issuer.subject, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(authority_key, critical=False)
        )

    def _sign(self, builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> KeyPair:
        return _pair(builder.sign(self._key, hashes.SHA256()), key)


def kubeconfig(server: str, authority: bytes, login: dict[str, str], namespace: str = "default") -> str:
    """A kubeconfig, as YAML, for one server and one user."""
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "octavo", "cluster": {"server": server, "certificate-authority-data": _base64(authority)}}
            ],
            "users": [{"name": "octavo", "user": login}],
            "contexts": [
                {"name": "octavo", "context": {"cluster": "octavo", "user": "octavo", "namespace": namespace}}
            ],
            "current-context": "octavo",
        }
    )


def new_private_key() -> bytes:
    """A private key to sign service-account tokens, in the one PEM form that the API server reads it in."""
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(encoding, form, serialization.NoEncryption())


def write_private(path: Path, content: bytes | str) -> None:
    """Write a file that only its owner can read, from its first moment on."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _new_authority() -> KeyPair:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name("octavo-test-cluster")
    builder = (
        _unsigned(subject, subject, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
    )
    return _pair(builder.sign(key, hashes.SHA256()), key)


def _unsigned(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + _VALIDITY)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(user: str, *groups: str) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    return x509.Name([*attributes, x509.NameAttribute(NameOID.COMMON_NAME, user)])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> KeyPair:
    return KeyPair(certificate.public_bytes(serialization.Encoding.PEM), _pem(key))


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
