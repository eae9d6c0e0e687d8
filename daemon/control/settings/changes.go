package settings

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// The path of a comparison: both settings as JSON trees ─▶ walk side by side ─▶ what
// differs, by path. What has a name is found by it, so that a new uplink in the middle
// does not change all that follow.

// Change is one setting that is different.
type Change struct {
	// Path is that of the setting, as uplinks[lte].mode.
	Path string `json:"path"`
	// From and To are its values, as in a settings file; empty where there is none.
	From string `json:"from,omitempty"`
	To   string `json:"to,omitempty"`
}

// Changes are what leads from one set of settings to another, in the order of paths.
func Changes(from, to Settings) []Change {
	list := []Change{}
	walk("", tree(from), tree(to), &list)
	return list
}

// tree is settings as encoding/json decodes them.
func tree(s Settings) (v any) {
	text, err := json.Marshal(normal(s))
	if err == nil {
		err = json.Unmarshal(text, &v)
	}
	if err != nil {
		panic("settings: these types always have a JSON form: " + err.Error())
	}
	return v
}

func walk(path string, from, to any, list *[]Change) {
	switch f := from.(type) {
	case map[string]any:
		t, ok := to.(map[string]any)
		if !ok {
			break
		}
		for _, name := range union(f, t) {
			walk(strings.TrimPrefix(path+"."+name, "."), f[name], t[name], list)
		}
		return
	case []any:
		t, _ := to.([]any)
		walkList(path, f, t, list)
		return
	case nil:
		if t, ok := to.([]any); ok {
			walkList(path, nil, t, list)
			return
		}
	}
	if a, b := scalar(from), scalar(to); a != b {
		*list = append(*list, Change{Path: path, From: a, To: b})
	}
}

func walkList(path string, from, to []any, list *[]Change) {
	fromNames, named := names(from)
	toNames, alsoNamed := names(to)
	if !named || !alsoNamed {
		if a, b := scalar(from), scalar(to); a != b {
			*list = append(*list, Change{Path: path, From: a, To: b})
		}
		return
	}
	before, after := index(fromNames, from), index(toNames, to)
	for _, name := range union(before, after) {
		walk(fmt.Sprintf("%s[%s]", path, name), before[name], after[name], list)
	}
	// Their order counts: the first uplink that is fit is the best.
	kept := func(in, other []string) []string {
		return slices.DeleteFunc(slices.Clone(in), func(n string) bool { return !slices.Contains(other, n) })
	}
	if a, b := kept(fromNames, toNames), kept(toNames, fromNames); !slices.Equal(a, b) {
		*list = append(*list, Change{Path: path, From: strings.Join(a, ", "), To: strings.Join(b, ", ")})
	}
}

// names are those of a list's elements, if each is an object that has one.
func names(list []any) ([]string, bool) {
	var all []string
	for _, v := range list {
		object, _ := v.(map[string]any)
		name, ok := object["name"].(string)
		if !ok {
			return nil, false
		}
		all = append(all, name)
	}
	return all, true
}

func index(names []string, list []any) map[string]any {
	m := map[string]any{}
	for i, name := range names {
		m[name] = list[i]
	}
	return m
}

func union(a, b map[string]any) []string {
	all := maps.Clone(a)
	maps.Copy(all, b)
	return slices.Sorted(maps.Keys(all))
}

// scalar is a value as a settings file could hold it in one line: JSON is YAML, and
// words need no quotes.
func scalar(v any) string {
	switch v := v.(type) {
	case nil:
		return ""
	case string:
		return v
	case []any:
		if len(v) == 0 {
			return ""
		}
	}
	text, err := json.Marshal(v)
	if err != nil {
		panic("settings: a decoded value always has a JSON form: " + err.Error())
	}
	return string(text)
}
