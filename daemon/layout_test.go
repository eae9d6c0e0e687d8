package daemon

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// law says which of our packages a package may import, by prefix. It is the
// table of doc.go; a package that is not in it may not exist.
var law = map[string][]string{
	"cmd":                       {"sheaf"},
	"daemon":                    {},
	"daemon/router":             {"sheaf/daemon/datapath", "sheaf/daemon/control", "sheaf/webui"},
	"daemon/concentrator":       {"sheaf/daemon/datapath", "sheaf/daemon/control", "sheaf/webui"},
	"daemon/datapath/bond":      {},
	"daemon/datapath/intercept": {},
	"daemon/datapath/leg":       {},
	"daemon/datapath/tun":       {},
	"daemon/datapath/tunnel":    {},
	"daemon/datapath/uplink":    {},
	"daemon/datapath/egress":    {},
	"daemon/control/settings":   {},
	"daemon/control/desired":    {"sheaf/daemon/control/settings", "sheaf/daemon/datapath/uplink"},
	"daemon/control/kernel":     {"sheaf/daemon/control/desired"},
	"daemon/control/reconcile":  {"sheaf/daemon/control/desired"},
	"board/common/kerneltest":   {},
	"daemon/netlab":             {},
	"daemon/netlab/deploy":      {"sheaf/daemon/control/settings", "sheaf/daemon/netlab", "sheaf/webui"},
	"webui":                     {"sheaf/daemon/control/settings"},
}

// topLevel is all that may stand at the top of the repository.
var topLevel = []string{
	"firmware", "daemon", "webui", "board", "rootfs", "cmd", "go.mod", "go.sum", "Makefile", "README.md",
}

func TestImportLaw(t *testing.T) {
	seen := map[string]bool{}
	err := filepath.WalkDir("..", func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := entry.Name()
		if entry.IsDir() && (path != ".." && strings.HasPrefix(name, ".") || name == "testdata" || name == "node_modules" || path == "../bin" || path == "../build") {
			return filepath.SkipDir
		}
		if entry.IsDir() || !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		folder, err := filepath.Rel("..", filepath.Dir(path))
		if err != nil {
			return err
		}
		if strings.HasPrefix(folder, "cmd/") {
			folder = "cmd"
		}
		allowed, ok := law[folder]
		if !ok {
			t.Errorf("%s: package %s is not in the law of layout_test.go; add it there, and to doc.go", path, folder)
			return nil
		}
		seen[folder] = true
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range file.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			if !strings.HasPrefix(imported, "sheaf/") && imported != "sheaf" {
				continue
			}
			if !slices.ContainsFunc(allowed, func(prefix string) bool {
				return imported == prefix || strings.HasPrefix(imported, prefix+"/")
			}) {
				t.Errorf("%s imports %s; the law lets %s import %v", path, imported, folder, allowed)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for folder := range law {
		if !seen[folder] {
			t.Errorf("the law names %s, which does not exist", folder)
		}
	}
}

func TestTopLevel(t *testing.T) {
	entries, err := os.ReadDir("..")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, ".") || name == "bin" || name == "build" { // the last two are built, and ignored by git
			continue
		}
		if !slices.Contains(topLevel, name) {
			t.Errorf("%s does not belong at the top level; it holds %v", name, topLevel)
		}
	}
	for _, name := range topLevel {
		if _, err := os.Stat(filepath.Join("..", name)); err != nil {
			t.Errorf("%v", err)
		}
	}
}
