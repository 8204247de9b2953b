# Included by the Makefile: podwall's image, and the tests on a real cluster. They are described in tests/cluster/README.md.

IMAGE ?= ghcr.io/podwall/podwall:dev
CLUSTER := bin/podwall-cluster

.PHONY: image
image: bin/podwall-image.tar ## build the container image, an OCI archive, as bin/podwall-image.tar, without Docker

# One layer of static programs, no shell.
.PHONY: bin/podwall-image.tar
bin/podwall-image.tar: build
	go run ./install/image -o $@ -name $(IMAGE) -label org.opencontainers.image.version=$(VERSION) \
		-label org.opencontainers.image.source=https://$(MODULE) \
		$(foreach p,podwall podwalld podwall-install,/usr/local/bin/$(p)=bin/$(p))

# A module of its own, so that Kubernetes stays out of the product's go.mod.
.PHONY: $(CLUSTER)
$(CLUSTER):
	go -C tests/cluster build -o $(CURDIR)/$@ .

.PHONY: test-cluster
test-cluster: root deps image $(CLUSTER) ## tests on real Kubernetes clusters: upstream suite and podwall's own (as root; the first build takes minutes)
	$(CLUSTER) test $(TESTFLAGS)

.PHONY: cluster-up
cluster-up: root deps image $(CLUSTER) # for experiments; TESTFLAGS="-nodes 1 -cni ptp"
	$(CLUSTER) up $(TESTFLAGS)
	$(CLUSTER) load bin/podwall-image.tar

.PHONY: cluster-down
cluster-down: root $(CLUSTER)
	$(CLUSTER) down
