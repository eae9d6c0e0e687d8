# Sheaf's commands. `make demo` and `make test` install what they need on Debian
# and Ubuntu; both need root, because they make network namespaces.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
TAGS := nomsgpack
BIN := bin
TOOLS := build/tools
LINT_VERSION := v2.12.2
LINT := $(TOOLS)/golangci-lint-$(LINT_VERSION)
OAPI_VERSION := v2.8.2
OAPI := $(TOOLS)/oapi-codegen-$(OAPI_VERSION)
GOBUILD := CGO_ENABLED=0 go build -trimpath -tags $(TAGS) -ldflags "-s -w -X main.version=$(VERSION)"
GO_FILES := $(shell git ls-files --cached --others --exclude-standard '*.go' go.mod go.sum)

.PHONY: help
help: ## what there is
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name what; do printf 'make %-11s %s\n' "$$name" "$$what"; done

.PHONY: build
build: $(BIN)/.built ## the programs, into bin/

$(BIN)/.built: $(GO_FILES) Makefile
	mkdir -p $(BIN)
	$(GOBUILD) -o $(BIN)/ ./cmd/...
	touch $@

.PHONY: demo
demo: need-demo build ## watch one download over one uplink, over three, and while one is pulled (HOLD=1 keeps the lab up)
	$(BIN)/netlab demo $(if $(HOLD),--hold)

.PHONY: bench
bench: build ## the figures, as ratios within one run (PART=failover for one of them, RUNS=3 for fewer runs; `bin/netlab bench -h` lists the parts)
	$(BIN)/netlab bench $(if $(PART),--only $(PART)) $(if $(RUNS),--runs $(RUNS))

.PHONY: test
test: need-test build generated lint ## everything that must pass: contract, lint, import law, unit tests, end to end in namespaces
	CGO_ENABLED=1 go test -count=1 -race -tags $(TAGS) -timeout 15m $$(go list -tags $(TAGS) ./... | grep -v /netlab/deploy)
	SHEAF_BINARIES=$(CURDIR)/$(BIN) go test -count=1 -tags $(TAGS) -timeout 20m -v ./daemon/netlab/deploy
	@echo "all tests passed"

.PHONY: unit
unit: ## the tests that need no built programs
	go test -tags $(TAGS) $$(go list -tags $(TAGS) ./... | grep -v /netlab/deploy)

# The cache is this checkout's own: golangci-lint's shared one keeps the paths of other checkouts,
# also of deleted ones, and then misses what their lines say.
.PHONY: lint
lint: $(LINT) ## formatting, vet and golangci-lint
	@test -z "$$(gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go'))" || { gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go'); echo "run gofmt -w on these"; exit 1; }
	GOARCH=arm64 go vet -tags $(TAGS) ./...
	GOLANGCI_LINT_CACHE=$(CURDIR)/build/lint-cache $(LINT) run --build-tags $(TAGS) ./...

# Built with the newest Go there is, outside this module: its dependencies are not ours.
$(LINT):
	mkdir -p $(TOOLS)
	GOBIN=$(CURDIR)/$(TOOLS) go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(LINT_VERSION)
	mv $(TOOLS)/golangci-lint $@

.PHONY: generate
generate: $(OAPI) ## what is made of webui/openapi.yaml
	$(OAPI) -config webui/generate.yaml -o webui/api.gen.go webui/openapi.yaml

.PHONY: generated
generated: $(OAPI)
	@mkdir -p build && $(OAPI) -config webui/generate.yaml -o build/api.gen.go webui/openapi.yaml
	@diff -q build/api.gen.go webui/api.gen.go >/dev/null || { echo "webui/api.gen.go is not what webui/openapi.yaml makes; run make generate"; exit 1; }

$(OAPI):
	mkdir -p $(TOOLS)
	GOBIN=$(CURDIR)/$(TOOLS) go install github.com/oapi-codegen/oapi-codegen/v2/cmd/oapi-codegen@$(OAPI_VERSION)
	mv $(TOOLS)/oapi-codegen $@

.PHONY: fuzz
fuzz: ## look for inputs that break the parsers, one minute each
	go test -run '^$$' -fuzz FuzzDecoder -fuzztime 60s ./daemon/datapath/tunnel
	go test -run '^$$' -fuzz FuzzParse -fuzztime 60s ./daemon/control/settings
	go test -run '^$$' -fuzz FuzzParse -fuzztime 60s ./daemon/datapath/bond
	go test -run '^$$' -fuzz FuzzReceive -fuzztime 60s ./daemon/datapath/bond
	go test -run '^$$' -fuzz FuzzParseQuery -fuzztime 60s ./daemon/datapath/egress
	go test -run '^$$' -fuzz FuzzParsePacket -fuzztime 60s ./daemon/netlab

.PHONY: clean
clean: ## remove what was built
	rm -rf $(BIN) build

# $(call need,program,package): install what is missing with apt-get.
define need
	@command -v $(1) >/dev/null || { echo "installing $(2)"; apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(2); }
endef

.PHONY: need-root need-demo need-test
need-root:
	@test "$$(id -u)" = 0 || { echo "this makes network namespaces and needs root: run it as root, or with sudo env PATH=\"\$$PATH\" make …"; exit 1; }
	@test -e /proc/sys/net/mptcp/enabled || { echo "this kernel has no MPTCP (no /proc/sys/net/mptcp); Debian 12 and Ubuntu 24.04 have it in their stock kernels"; exit 1; }

need-demo: need-root
	$(call need,curl,curl ca-certificates)
	$(call need,busybox,busybox)

need-test: need-demo
	$(call need,gcc,gcc libc6-dev)

include board/common/kernel.mk
