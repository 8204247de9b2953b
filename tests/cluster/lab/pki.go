package lab

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// pki writes what the control plane needs to be trusted: ca.crt, apiserver.crt and .key, sa.key, tokens.csv, and the
// administrator's kubeconfig. They are of use only inside the nodes' networks.
func (l *Lab) pki() error {
	ca, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	server, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	accounts, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	now := time.Now()
	caCert := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "podwall-lab"}, NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(1, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	serverCert := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "kube-apiserver"}, NotBefore: caCert.NotBefore, NotAfter: caCert.NotAfter,
		DNSNames:    []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
		IPAddresses: []net.IP{net.ParseIP("127.0.0.1"), net.ParseIP("10.96.0.1"), net.ParseIP(nodeIP("node1"))},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	kubeconfig := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: lab, cluster: {server: "https://%s:6443", certificate-authority: %s}}]
users: [{name: admin, user: {token: admin}}]
contexts: [{name: lab, context: {cluster: lab, user: admin}}]
current-context: lab
`, nodeIP("node1"), filepath.Join(l.run(), "ca.crt"))
	return errors.Join(
		l.writeCert("ca.crt", caCert, caCert, &ca.PublicKey, ca),
		l.writeCert("apiserver.crt", serverCert, caCert, &server.PublicKey, ca),
		l.writeKey("apiserver.key", server),
		l.writeKey("sa.key", accounts),
		l.write("tokens.csv", []byte("admin,admin,admin,\"system:masters\"\n")),
		l.write(filepath.Base(l.Kubeconfig()), []byte(kubeconfig)),
	)
}

func (l *Lab) writeCert(name string, cert, parent *x509.Certificate, public, signer any) error {
	der, err := x509.CreateCertificate(rand.Reader, cert, parent, public, signer)
	if err != nil {
		return err
	}
	return l.write(name, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func (l *Lab) writeKey(name string, key crypto.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return l.write(name, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

func (l *Lab) write(name string, data []byte) error {
	return os.WriteFile(filepath.Join(l.run(), name), data, 0o600)
}
