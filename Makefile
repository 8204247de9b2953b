# Targets with a comment behind two number signs are listed by `make help`.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export PATH := $(PATH):/usr/sbin:/sbin

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)
FUZZTIME ?= 10m
VERDICTS ?= 3000000
MEMORY_STEPS ?= 100000
ENGINE_VERDICTS ?= 1000000
KERNEL_STEPS ?= 5000
GO_BUILD := CGO_ENABLED=0 go build -trimpath

PROGRAMS := podwall podwalld $(if $(wildcard install/*.go),podwall-install)
MODULE := github.com/podwall/podwall
E2E := ./tests/e2e/... ./tests/faults/...
LINT := go tool -modfile=tools/go.mod golangci-lint

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: $(PROGRAMS:%=bin/%) ## build the programs, static, into bin/

# Go knows what is up to date.
.PHONY: $(PROGRAMS:%=bin/%)
bin/podwall: SOURCE := ./plugin
bin/podwalld: SOURCE := ./daemon
bin/podwall-install: SOURCE := ./install
$(PROGRAMS:%=bin/%):
	$(GO_BUILD) -ldflags "$(LDFLAGS)" -o $@ $(SOURCE)

.PHONY: tools
tools: bin/cni/.built ## build cnitool and the CNI plugins that tests and demo chain after, into bin/cni/

bin/cni/.built: go.mod go.sum
	$(GO_BUILD) -ldflags "-s -w" -o bin/cni/ tool
	@touch $@

.PHONY: deps
deps: # what tests and demo run beside Go
	@hack/deps.sh ip nft gcc

.PHONY: root
root:
	@if ((EUID != 0)); then echo "$(MAKECMDGOALS) makes network namespaces and nftables rules in them: run it as root" >&2; exit 1; fi

.PHONY: demo
demo: root deps build tools ## who reaches whom, for every example: builds a node out of namespaces (as root, leaves nothing)
	$(GO_BUILD) -o bin/podwall-demo ./tests/demo
	bin/podwall-demo

.PHONY: test
test: root deps build tools ## all tests but the cluster's: vet, unit (race detector), kernel, end to end, oracle (as root)
	go vet ./...
	go -C tests/oracle vet ./...
	go build -o bin/testreport ./hack/testreport
	{ failed=0; \
	  go test -json -count=1 -timeout 10m -race -cover $$(go list ./... | grep -vE "/tests/(e2e|faults)") || failed=1; \
	  PODWALL_E2E_BIN=$(CURDIR)/bin go test -json -count=1 -timeout 10m $(E2E) || failed=1; \
	  go -C tests/oracle test -json -count=1 -timeout 10m ./... || failed=1; \
	  exit $$failed; } | bin/testreport -cover $(MODULE)/pkg/policy=90 -cover $(MODULE)/pkg/ruleset=90
	hack/fuzz.sh 2s

.PHONY: test-race
test-race: root deps build tools ## all of that with the race detector, in the daemon of the end-to-end tests as well (as root)
	mkdir -p bin/race
	cp -a bin/podwall bin/cni bin/race/
	CGO_ENABLED=1 go build -race -o bin/race/podwalld ./daemon
	GORACE=halt_on_error=1 PODWALL_E2E_BIN=$(CURDIR)/bin/race go test -race -count=1 -timeout 20m ./...

.PHONY: fuzz
fuzz: root deps ## millions of random verdicts, in memory and in the kernel, against the oracle; every fuzz target for FUZZTIME (as root)
	go -C tests/oracle test -count=1 -timeout 60m -v -run 'TestVerdicts|TestSequences' ./memory -verdicts $(VERDICTS) -steps $(MEMORY_STEPS)
	go -C tests/oracle test -count=1 -timeout 60m -v -run 'TestKernelAgreesWithOracle|TestUpdateSequences' ./kernel -kernel-verdicts $(VERDICTS) -kernel-steps $(KERNEL_STEPS)
	go -C tests/oracle test -count=1 -timeout 60m -v -run TestEngines ./engines -engine-verdicts $(ENGINE_VERDICTS)
	hack/fuzz.sh $(FUZZTIME)

# A benchmark's directory in tests/bench and its file in OUT have the same name.
BENCHMARKS := dataplane control attach scale
OUT ?= $(CURDIR)/docs/performance
PAGE = $(if $(filter $(CURDIR)/docs/performance,$(OUT)),$(CURDIR)/docs/performance.md,$(OUT)/performance.md)
.PHONY: bench
bench: root deps build tools ## measure packets, changes, ADD and memory and write docs/performance.md; QUICK=-quick OUT=dir: a short one (as root)
	@for name in $(BENCHMARKS); do \
	  echo "bench: $$name" >&2; \
	  PODWALL_E2E_BIN=$(CURDIR)/bin go -C tests/bench run ./$$name -o "$(abspath $(OUT))" $(QUICK); \
	done
	go -C tests/bench run ./report -in "$(abspath $(OUT))" -out "$(abspath $(PAGE))" -plots "$(abspath $(OUT))"

.PHONY: faults
faults: root deps build tools ## endurance: daemons killed under traffic, policy flips, churn of pods, revocation (as root, takes an hour)
	PODWALL_E2E_BIN=$(CURDIR)/bin go test -v -count=1 -timeout 2h ./tests/faults -args -kills 500 -flips 1000 -attachments 10000 -revocations 200 -revoked-flows 100000 -unrelated-flows 100000

.PHONY: mutants
mutants: ## build podwall wrong in every way that is listed, one at a time; the oracle's tests must see each
	go -C tests/oracle run ./mutants

.PHONY: lint
lint: ## golangci-lint, from a module of its own (the first run builds it: minutes)
	$(LINT) run ./...
	cd tests/oracle && go tool -modfile=$(CURDIR)/tools/go.mod golangci-lint run --config $(CURDIR)/.golangci.yml ./...
	cd tests/bench && go tool -modfile=$(CURDIR)/tools/go.mod golangci-lint run --config $(CURDIR)/.golangci.yml ./...

.PHONY: verify
verify: ## what must hold before a commit: formatted, tidy, vetted, imports in the right direction
	@unformatted=$$(gofmt -l .); \
	if [[ -n $$unformatted ]]; then echo "run gofmt -w on:" $$unformatted >&2; exit 1; fi
	go mod tidy -diff
	go -C tests/oracle mod tidy -diff
	go -C tests/bench mod tidy -diff
	go vet ./...
	go -C tests/oracle vet ./...
	go -C tests/bench vet ./...
	go test -count=1 ./tests

.PHONY: clean
clean: ## remove bin/
	rm -rf bin

include tests/cluster/cluster.mk
