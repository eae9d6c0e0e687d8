package main

import (
	"bytes"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"sheaf/webui"
)

func TestPrintRouters(t *testing.T) {
	when := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	for name, test := range map[string]struct {
		routers []webui.EnrolledRouter
		want    string
	}{
		"none": {nil, "NAME  ENROLLED  LAST SEEN  ADDRESS  INNER IPV4  INNER IPV6  SESSIONS  FLOWS  CARRIERS  KEY\n"},
		"one at work, one never seen": {[]webui.EnrolledRouter{
			{Name: "home", Fingerprint: "SHA256:f00d", EnrolledAt: when, LastSeen: new(when.Add(time.Hour)), Address: "198.51.100.7:5000",
				Inner4: "10.83.0.7", Inner6: "fd4c:11a0:93e2:6::1", Sessions: 12, Flows: 3,
				Carriers: []webui.RouterCarrier{{Link: "dsl", Carrier: "datagram"}, {Carrier: "stream"}, {Link: "\x1b[31m\n", Carrier: "datagram"}}},
			{Name: "office", Fingerprint: "SHA256:beef", EnrolledAt: when},
		}, `
NAME    ENROLLED             LAST SEEN            ADDRESS            INNER IPV4  INNER IPV6           SESSIONS  FLOWS  CARRIERS                                   KEY
home    2026-03-04 05:06:07  2026-03-04 06:06:07  198.51.100.7:5000  10.83.0.7   fd4c:11a0:93e2:6::1  12        3      dsl datagram, stream, \x1b[31m\n datagram  SHA256:f00d
office  2026-03-04 05:06:07  -                    -                  -           -                    0         0      -                                          SHA256:beef
`[1:]},
	} {
		t.Run(name, func(t *testing.T) {
			var got bytes.Buffer
			if err := printRouters(&got, test.routers); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got.String()); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
}
