package settings

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io"
	"math"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// The path of a text through this file:
//
//	text ─▶ one YAML node tree ─▶ document (typed, with the line of every path)
//	     ─▶ Validate's problems, given those lines ─▶ Settings or *Invalid
//
// The tree is walked by hand instead of being unmarshalled, so that one answer
// lists every problem with its line, and so that an alias is never expanded.

// MaxText is the length of the longest text that Parse reads.
const MaxText = 1 << 20

// maxProblems bounds the answer to a text that is wrong throughout.
const maxProblems = 100

// Problem is one thing that is wrong with settings.
type Problem struct {
	Line   int    `json:"line,omitempty"` // 0 when the settings did not come from a text
	Path   string `json:"path,omitempty"` // such as uplinks[1].interface
	Reason string `json:"reason"`
}

func (p Problem) String() string {
	var b strings.Builder
	if p.Line > 0 {
		fmt.Fprintf(&b, "line %d: ", p.Line)
	}
	if p.Path != "" {
		b.WriteString(p.Path + ": ")
	}
	b.WriteString(p.Reason)
	return b.String()
}

// Invalid is the error for settings that cannot be accepted; nothing has been
// changed when it is returned.
type Invalid struct{ Problems []Problem }

func (e *Invalid) Error() string {
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// Default is what holds before the operator has chosen anything. It is the only
// Settings without a LAN interface.
func Default() Settings {
	return Settings{
		Version: 1,
		LAN:     LAN{Interfaces: []string{}, DNS: true},
		Uplinks: []Uplink{},
		Multipath: Multipath{
			Enabled:     true,
			PathManager: PathManagerFullmesh,
			Scheduler:   "default",
			SYNRetries:  2,

			CongestionControl: Auto,
			Subflows:          defaultSubflows,
		},
		WhenTunnelDown: Direct,
	}
}

// Parse reads settings from YAML, of which JSON is a part. Absent keys take
// their defaults. The error for a text that is read but refused is an *Invalid.
func Parse(text []byte) (Settings, error) {
	if len(text) > MaxText {
		return Settings{}, &Invalid{[]Problem{{Reason: fmt.Sprintf("the text has %d bytes: at most %d are read", len(text), MaxText)}}}
	}
	root, err := parseTree(text)
	if err != nil {
		return Settings{}, err
	}
	d := document{lines: map[string]int{}}
	s := d.settings(root)
	unread := d.problems
	for _, p := range check(s) {
		// A value that could not be read holds its default or nothing; saying
		// that this too is wrong, or that it is lacking in what is around it,
		// would only repeat the problem.
		repeats := slices.ContainsFunc(unread, func(u Problem) bool { return within(p.Path, u.Path) || within(u.Path, p.Path) })
		if !repeats {
			p.Line = d.line(p.Path)
			d.problems = append(d.problems, p)
		}
	}
	if len(d.problems) > 0 {
		slices.SortStableFunc(d.problems, func(a, b Problem) int { return a.Line - b.Line })
		if len(d.problems) > maxProblems {
			d.problems = d.problems[:maxProblems]
		}
		return Settings{}, &Invalid{d.problems}
	}
	return s, nil
}

var (
	yamlErrorLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)`)
	// yamlParserError matches what the library's parser says, as against its
	// scanner: the library counts the parser's lines from 0.
	yamlParserError = regexp.MustCompile(`^did not find expected ('-' indicator|key|',' or|node content|<document start>)|^found (duplicate %|incompatible YAML|undefined tag)`)
)

// parseTree returns the root of the only document in text.
func parseTree(text []byte) (*yaml.Node, error) {
	refuse := func(line int, reason string) error {
		return &Invalid{[]Problem{{Line: line, Reason: reason}}}
	}
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	var doc yaml.Node
	switch err := decoder.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil, refuse(1, "the text holds no settings: at least version and lan are needed")
	case err != nil:
		return nil, syntaxError(err)
	}
	var second yaml.Node
	switch err := decoder.Decode(&second); {
	case errors.Is(err, io.EOF):
	case err != nil:
		return nil, syntaxError(err)
	default:
		return nil, refuse(second.Line, "a second document begins here: settings are one document")
	}
	return doc.Content[0], nil
}

func syntaxError(err error) error {
	p := Problem{Line: 1, Reason: err.Error()}
	if m := yamlErrorLine.FindStringSubmatch(err.Error()); m != nil {
		if line, err := strconv.Atoi(m[1]); err == nil {
			p.Line = line
			if yamlParserError.MatchString(m[2]) {
				p.Line++
			}
		}
		// The line is that of the value that the library was reading.
		p.Reason = "what begins here is not YAML: " + m[2]
	}
	return &Invalid{[]Problem{p}}
}

// document reads typed values out of a node tree, and collects what is wrong.
type document struct {
	lines    map[string]int // line of every path that the text gives
	problems []Problem
}

func (d *document) problem(n *yaml.Node, path, reason string) {
	d.problems = append(d.problems, Problem{n.Line, path, reason})
}

// line is the line of a path, or of the nearest path around it that the text
// gives: a missing key is reported where it should have been.
func (d *document) line(path string) int {
	for {
		if line, ok := d.lines[path]; ok {
			return line
		}
		cut := strings.LastIndexAny(path, ".[")
		if cut < 0 {
			return 1
		}
		path = path[:cut]
	}
}

// within says whether path is outer or a part of it.
func within(path, outer string) bool {
	rest, ok := strings.CutPrefix(path, outer)
	return ok && (outer == "" || rest == "" || rest[0] == '.' || rest[0] == '[')
}

func (d *document) settings(root *yaml.Node) Settings {
	s := Default()
	s.Version = 0 // required, so that a later schema is never read as this one
	d.mapping(root, "", fields{
		"version": func(n *yaml.Node, path string) { d.integer(n, path, &s.Version) },
		"lan": func(n *yaml.Node, path string) {
			d.mapping(n, path, fields{
				"interfaces": func(n *yaml.Node, path string) {
					d.sequence(n, path, maxLANInterfaces, func(n *yaml.Node, path string) {
						var name string
						d.text(n, path, &name)
						s.LAN.Interfaces = append(s.LAN.Interfaces, name)
					})
				},
				"dns": func(n *yaml.Node, path string) { d.boolean(n, path, &s.LAN.DNS) },
			})
		},
		"uplinks": func(n *yaml.Node, path string) {
			d.sequence(n, path, MaxUplinks, func(n *yaml.Node, path string) {
				s.Uplinks = append(s.Uplinks, d.uplink(n, path))
			})
		},
		"concentrator": func(n *yaml.Node, path string) {
			d.mapping(n, path, fields{
				"token": func(n *yaml.Node, path string) { d.text(n, path, &s.Concentrator.Token) },
			})
		},
		"multipath": func(n *yaml.Node, path string) {
			m := &s.Multipath
			d.mapping(n, path, fields{
				"enabled":      func(n *yaml.Node, path string) { d.boolean(n, path, &m.Enabled) },
				"path_manager": func(n *yaml.Node, path string) { d.text(n, path, (*string)(&m.PathManager)) },
				"scheduler":    func(n *yaml.Node, path string) { d.text(n, path, &m.Scheduler) },
				"checksum":     func(n *yaml.Node, path string) { d.boolean(n, path, &m.Checksum) },
				"syn_retries":  func(n *yaml.Node, path string) { d.integer(n, path, &m.SYNRetries) },
				"congestion_control": func(n *yaml.Node, path string) {
					d.text(n, path, (*string)(&m.CongestionControl))
				},
				"subflows":    func(n *yaml.Node, path string) { d.integer(n, path, &m.Subflows) },
				"out_of_tree": func(n *yaml.Node, path string) { d.outOfTree(n, path, &m.OutOfTree) },
			})
		},
		"when_tunnel_down": func(n *yaml.Node, path string) { d.text(n, path, (*string)(&s.WhenTunnelDown)) },
		"forwards": func(n *yaml.Node, path string) {
			d.sequence(n, path, MaxForwards, func(n *yaml.Node, path string) {
				s.Forwards = append(s.Forwards, d.forward(n, path))
			})
		},
		"classes": func(n *yaml.Node, path string) {
			d.sequence(n, path, MaxClasses, func(n *yaml.Node, path string) {
				s.Classes = append(s.Classes, d.class(n, path))
			})
		},
	})
	return s
}

// anAddress says what a single address must look like.
const anAddress = "an IP address: write 192.0.2.53 or 2001:db8::53"

func (d *document) outOfTree(n *yaml.Node, path string, to *OutOfTree) {
	d.mapping(n, path, fields{
		"debug":           func(n *yaml.Node, path string) { d.boolean(n, path, &to.Debug) },
		"binder_gateways": func(n *yaml.Node, path string) { d.text(n, path, &to.BinderGateways) },
		"num_segments":    func(n *yaml.Node, path string) { d.integer(n, path, &to.NumSegments) },
		"cwnd_limited":    func(n *yaml.Node, path string) { d.text(n, path, &to.CwndLimited) },
	})
}

func (d *document) uplink(n *yaml.Node, path string) Uplink {
	u := Uplink{Mode: On, Address: Address{Method: Existing}}
	d.mapping(n, path, fields{
		"name":      func(n *yaml.Node, path string) { d.text(n, path, &u.Name) },
		"interface": func(n *yaml.Node, path string) { d.text(n, path, &u.Interface) },
		"mode":      func(n *yaml.Node, path string) { d.text(n, path, (*string)(&u.Mode)) },
		"address": func(n *yaml.Node, path string) {
			d.mapping(n, path, fields{
				"method":  func(n *yaml.Node, path string) { d.text(n, path, (*string)(&u.Address.Method)) },
				"gateway": func(n *yaml.Node, path string) { d.parsed(n, path, &u.Address.Gateway, anAddress) },
				"source":  func(n *yaml.Node, path string) { d.parsed(n, path, &u.Address.Source, anAddress) },
			})
		},
		"resolvers": func(n *yaml.Node, path string) {
			d.sequence(n, path, maxResolvers, func(n *yaml.Node, path string) {
				var resolver netip.Addr
				d.parsed(n, path, &resolver, anAddress)
				u.Resolvers = append(u.Resolvers, resolver)
			})
		},
		"weight":     func(n *yaml.Node, path string) { d.integer(n, path, &u.Weight) },
		"preference": func(n *yaml.Node, path string) { d.integer(n, path, &u.Preference) },
	})
	return u
}

func (d *document) forward(n *yaml.Node, path string) Forward {
	f := Forward{Source: SourceClient}
	d.mapping(n, path, fields{
		"name":     func(n *yaml.Node, path string) { d.text(n, path, &f.Name) },
		"protocol": func(n *yaml.Node, path string) { d.text(n, path, &f.Protocol) },
		"port": func(n *yaml.Node, path string) {
			var port int
			d.integer(n, path, &port)
			if port < 0 || port > math.MaxUint16 {
				d.problem(n, path, fmt.Sprintf("is %d: a port is from 1 to 65535", port))
				return
			}
			f.Port = uint16(port)
		},
		"to": func(n *yaml.Node, path string) {
			d.parsed(n, path, &f.To, "an address with a port: write 192.168.1.10:80 or [2001:db8::10]:80")
		},
		"source": func(n *yaml.Node, path string) { d.text(n, path, (*string)(&f.Source)) },
	})
	return f
}

func (d *document) class(n *yaml.Node, path string) (c ClassRule) {
	d.mapping(n, path, fields{
		"class":    func(n *yaml.Node, path string) { d.text(n, path, &c.Class) },
		"protocol": func(n *yaml.Node, path string) { d.text(n, path, &c.Protocol) },
		"ports": func(n *yaml.Node, path string) {
			var text string
			d.word(n, path, &text)
			if err := c.Ports.UnmarshalText([]byte(text)); err != nil {
				d.problem(n, path, err.Error())
			}
		},
		"dscp": func(n *yaml.Node, path string) {
			var text string
			if d.word(n, path, &text); text == "" {
				return
			}
			if code, ok := codePoint(text); ok {
				c.DSCP = &code
				return
			}
			d.problem(n, path, quote(text)+" is not a code point: write 0 to 63, or a name such as ef, cs1 or af41")
		},
		"address": func(n *yaml.Node, path string) {
			// A single host may be written without its prefix length.
			if host, err := netip.ParseAddr(n.Value); err == nil && host.Zone() == "" && n.Kind == yaml.ScalarNode && n.Anchor == "" {
				c.Address = netip.PrefixFrom(host, host.BitLen())
				return
			}
			d.parsed(n, path, &c.Address, "an address or a prefix: write 192.168.1.10 or 192.168.1.0/24")
		},
	})
	return c
}

// codePoints are the names that are not systematic: RFC 2474 (default), RFC 3246
// (expedited forwarding), RFC 5865 (voice admit), RFC 8622 (lower effort).
var codePoints = map[string]int{"df": 0, "be": 0, "ef": 46, "va": 44, "le": 1}

// codePoint reads a DSCP as a number or by its name.
func codePoint(text string) (int, bool) {
	if code, err := strconv.ParseUint(text, 10, 6); err == nil {
		return int(code), true
	}
	name := strings.ToLower(text)
	if code, ok := codePoints[name]; ok {
		return code, true
	}
	// RFC 2474 section 4.2.2: class selector x is the three upper bits.
	if x, ok := strings.CutPrefix(name, "cs"); ok && len(x) == 1 && x[0] >= '0' && x[0] <= '7' {
		return int(x[0]-'0') << 3, true
	}
	// RFC 2597 section 6: AFxy is class x (1 to 4) with drop precedence y (1 to 3).
	if xy, ok := strings.CutPrefix(name, "af"); ok && len(xy) == 2 && xy[0] >= '1' && xy[0] <= '4' && xy[1] >= '1' && xy[1] <= '3' {
		return int(xy[0]-'0')<<3 | int(xy[1]-'0')<<1, true
	}
	return 0, false
}

// fields says how each key of a mapping is read.
type fields map[string]func(n *yaml.Node, path string)

func (d *document) mapping(n *yaml.Node, path string, known fields) {
	if d.skip(n, path) {
		return
	}
	if n.Kind != yaml.MappingNode {
		d.problem(n, path, "must be a mapping (key: value), not "+kind(n))
		return
	}
	first := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if key.Kind != yaml.ScalarNode || len(key.Value) > 64 {
			d.problem(key, path, "has a key that is "+kind(key)+": known are "+join(known))
			continue
		}
		inner := key.Value
		if path != "" {
			inner = path + "." + key.Value
		}
		read, ok := known[key.Value]
		if !ok {
			d.problem(key, printable(inner), "unknown key: known here are "+join(known))
			continue
		}
		if line, ok := first[key.Value]; ok {
			d.problem(key, inner, fmt.Sprintf("given twice: first on line %d", line))
			continue
		}
		first[key.Value] = key.Line
		// The key's line, because a mapping's own begins one further down.
		d.lines[inner] = key.Line
		read(value, inner)
	}
}

func (d *document) sequence(n *yaml.Node, path string, most int, read func(n *yaml.Node, path string)) {
	if d.skip(n, path) {
		return
	}
	if n.Kind != yaml.SequenceNode {
		d.problem(n, path, "must be a list, not "+kind(n))
		return
	}
	if len(n.Content) > most {
		d.problem(n, path, fmt.Sprintf("has %d entries: at most %d are possible", len(n.Content), most))
		return
	}
	for i, entry := range n.Content {
		inner := fmt.Sprintf("%s[%d]", path, i)
		d.lines[inner] = entry.Line
		if empty(entry) {
			d.problem(entry, inner, "is empty")
		}
		// An empty entry is read as well: it keeps the later ones in place.
		read(entry, inner)
	}
}

func (d *document) text(n *yaml.Node, path string, to *string) {
	if d.skip(n, path) {
		return
	}
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!str" {
		d.problem(n, path, "must be text, not "+kind(n))
		return
	}
	*to = n.Value
}

// parsed reads a text by the type's own rules; wanted says what it must be.
func (d *document) parsed(n *yaml.Node, path string, to encoding.TextUnmarshaler, wanted string) {
	var text string
	if d.text(n, path, &text); text == "" {
		return
	}
	if err := to.UnmarshalText([]byte(text)); err != nil {
		d.problem(n, path, quote(text)+" is not "+wanted)
	}
}

// word reads a text that may look like a number.
func (d *document) word(n *yaml.Node, path string, to *string) {
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!int" && n.Anchor == "" {
		*to = n.Value
		return
	}
	d.text(n, path, to)
}

func (d *document) integer(n *yaml.Node, path string, to *int) {
	if d.skip(n, path) {
		return
	}
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!int" {
		if i, err := strconv.Atoi(n.Value); err == nil {
			*to = i
			return
		}
	}
	d.problem(n, path, "must be a whole number, not "+kind(n))
}

func (d *document) boolean(n *yaml.Node, path string, to *bool) {
	if d.skip(n, path) {
		return
	}
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!bool" {
		*to = strings.EqualFold(n.Value, "true")
		return
	}
	d.problem(n, path, "must be true or false, not "+kind(n))
}

// skip says whether the value is to be passed over: a key without a value is
// the same as an absent one, because that is how JSON encoders write a list or
// a mapping that is empty.
func (d *document) skip(n *yaml.Node, path string) bool {
	if n.Kind == yaml.AliasNode {
		d.problem(n, path, "is an alias: write the value itself")
		return true
	}
	if n.Anchor != "" {
		d.problem(n, path, "has an anchor: anchors and aliases are not used in settings")
		return true
	}
	return empty(n)
}

func empty(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null"
}

// kind describes a value to the one who wrote it.
func kind(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return "an alias"
	}
	switch n.ShortTag() {
	case "!!str":
		return "the text " + quote(n.Value)
	case "!!null":
		return "nothing"
	case "!!bool", "!!int", "!!float":
		return n.Value
	}
	return quote(n.Value)
}

// quote shows a value from outside in a message, in bounded length.
func quote(s string) string {
	const most = 40
	if len(s) > most {
		return strconv.Quote(s[:most]) + "…"
	}
	return strconv.Quote(s)
}

// printable is a path with a key of the text in it, fit for one line.
func printable(path string) string {
	q := strconv.Quote(path)
	return q[1 : len(q)-1]
}

func join(known fields) string {
	names := make([]string, 0, len(known))
	for name := range known {
		names = append(names, name)
	}
	slices.Sort(names)
	return strings.Join(names, ", ")
}

// YAML writes the settings so that Parse gives them back.
func (s Settings) YAML() []byte {
	text, err := yaml.Marshal(s)
	if err != nil {
		panic("settings: these types always have a YAML form: " + err.Error())
	}
	return text
}

// MarshalYAML writes a mode as the contract shows it. By itself the library
// would quote on and off, for the sake of readers of YAML 1.1, where they are
// booleans.
func (m Mode) MarshalYAML() (any, error) {
	return &yaml.Node{Kind: yaml.ScalarNode, Value: string(m)}, nil
}

// MarshalYAML leaves out the addresses that are absent, and only those; see that
// of ClassRule.
func (a Address) MarshalYAML() (any, error) {
	text := func(a netip.Addr) string {
		if !a.IsValid() {
			return ""
		}
		return a.String()
	}
	return struct {
		Method  Method `yaml:"method"`
		Gateway string `yaml:"gateway,omitempty"`
		Source  string `yaml:"source,omitempty"`
	}{a.Method, text(a.Gateway), text(a.Source)}, nil
}

// MarshalYAML leaves out the conditions that are absent. By itself the library
// would leave out every address, because it sees no exported field in one.
func (c ClassRule) MarshalYAML() (any, error) {
	address := ""
	if c.Address.IsValid() {
		address = c.Address.String()
	}
	return struct {
		Class    string    `yaml:"class"`
		Protocol string    `yaml:"protocol,omitempty"`
		Ports    PortRange `yaml:"ports,omitempty"`
		DSCP     *int      `yaml:"dscp,omitempty"`
		Address  string    `yaml:"address,omitempty"`
	}{c.Class, c.Protocol, c.Ports, c.DSCP, address}, nil
}
