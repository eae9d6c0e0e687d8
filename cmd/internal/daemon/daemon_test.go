package daemon

import (
	"bytes"
	"encoding/json"
	"io"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func TestLog(t *testing.T) {
	for name, test := range map[string]struct {
		args []string
		code int
		want string // of what is logged; begins so
	}{
		"text":    {nil, 0, "time="},
		"json":    {[]string{"--log", "json"}, 0, "{"},
		"verbose": {[]string{"--verbose"}, 0, "time="},
		"xml":     {[]string{"--log=xml"}, exitUsage, "test: --log is \"xml\"; it must be text or json\n"},
	} {
		t.Run(name, func(t *testing.T) {
			var flags LogFlags
			c := &cobra.Command{Use: "test", RunE: func(c *cobra.Command, _ []string) error {
				log, err := flags.Log(c.ErrOrStderr())
				if err != nil {
					return err
				}
				log.Info("hello", "name", "wörld")
				log.Debug("more")
				return nil
			}}
			flags.Add(c, "more")
			var out bytes.Buffer
			if code := Main(c, test.args, io.Discard, &out); code != test.code || !strings.HasPrefix(out.String(), test.want) {
				t.Errorf("exit %d, %q", code, out.String())
			}
			if test.code == 0 && strings.Contains(out.String(), "more") != (name == "verbose") {
				t.Errorf("debug messages: %q", out.String())
			}
			var line map[string]any
			if name == "json" && (json.Unmarshal(out.Bytes(), &line) != nil || line["msg"] != "hello" || line["name"] != "wörld") {
				t.Errorf("%q", out.String())
			}
		})
	}
}
