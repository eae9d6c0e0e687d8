package webui

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
)

// valid are bodies that every operation with one takes.
var valid = map[string]string{
	"PutSettings": "", "CompareSettings": "", // judged by package settings, whose tests they are
	"SetUplink": `{"mode":"off","weight":3}`, "SetUplinkMode": `{"mode":"on"}`,
	"SetMultipath": `{"enabled":true,"path_manager":"default","scheduler":"x","checksum":true,"syn_retries":0,"congestion_control":"bbr"}`,
	"Confirm":      `{"revision":7}`, "Join": `{"token":"abc"}`,
	"Claim": `{"password":"correct horse battery"}`, "Login": `{"password":"correct horse battery"}`,
	"SetPassword": `{"old":"correct horse battery","password":"staple battery horse"}`, "NewToken": `{"name":"x","scope":"read"}`,
}

// Whatever is sent to any operation that its schema does not allow is refused with a
// problem, and the daemon never hears of it.
func TestContractRefuses(t *testing.T) {
	access, _, _ := newAccess(t)
	router := &fakeRouter{}
	h := NewRouterHandler(router, access, quiet())
	k, err := theContract()
	if err != nil {
		t.Fatal(err)
	}
	requests := 0
	send := func(method, path, contentType, body string) (status int, p Problem) {
		t.Helper()
		requests++
		r := httptest.NewRequest(method, "http://sheaf"+path, strings.NewReader(body))
		r.Header.Set("Content-Type", contentType)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code >= 400 {
			if err := json.Unmarshal(w.Body.Bytes(), &p); err != nil || p.Code == "" || p.Detail == "" || p.Status != w.Code {
				t.Errorf("%s %s %.80s: the refusal is %s", method, path, body, w.Body)
			}
		}
		return w.Code, p
	}
	// refused is for what is not allowed.
	refused := func(what, method, path, contentType, body string) {
		t.Helper()
		router.asked = ""
		if status, p := send(method, path, contentType, body); status < 400 || status > 422 || router.asked != "" {
			t.Errorf("%s: %s %s %.80s: %d %s; the router was asked %q", what, method, path, body, status, p.Code, router.asked)
		}
	}
	example := map[string]string{"name": "lte", "revision": "7", "id": "0123456789abcdef"}
	for route, r := range k.routes {
		operation := r.Operation.OperationID
		_, ginPath, _ := strings.Cut(route, " ")
		path := ginPath
		for name, value := range example {
			path = strings.Replace(path, ":"+name, value, 1)
		}
		for _, p := range r.Operation.Parameters {
			if p.Value.In != openapi3.ParameterInQuery {
				continue
			}
			for _, wrong := range []string{"x", "-1", "1.5", "99999999999999999999999", "%00", "[]"} {
				refused(p.Value.Name, r.Method, path+"?"+p.Value.Name+"="+wrong, "application/json", valid[operation])
			}
		}
		refused("a parameter too many", r.Method, path+"?x=1", "application/json", valid[operation])
		if r.Operation.RequestBody == nil {
			refused("a body too many", r.Method, path, "application/json", "{}")
			continue
		}
		body, known := valid[operation]
		if !known {
			t.Errorf("%s has a body that this test does not know", operation)
			continue
		}
		refused("a huge body", r.Method, path, "application/json", `"`+strings.Repeat("x", maxBody)+`"`)
		refused("a form", r.Method, path, "application/x-www-form-urlencoded", "mode=off")
		refused("no type", r.Method, path, "", body)
		for _, wrong := range []string{"", "{", "null", "7", `"x"`, "[]", `{"unknown":1}`, strings.Repeat("[", 100_000), "\x00", "{}{}", "\xff\xfe"} {
			refused("another body", r.Method, path, "application/json", wrong)
		}
		if body == "" {
			continue
		}
		if status, p := send(r.Method, path, "application/json", body); status >= 500 || status == http.StatusBadRequest {
			t.Errorf("%s does not take %s: %d %s", operation, body, status, p.Detail)
		}
		var fields map[string]any
		if err := json.Unmarshal([]byte(body), &fields); err != nil {
			t.Fatal(err)
		}
		with := func(name string, value any) string {
			changed := map[string]any{name: value}
			for n, v := range fields {
				if n != name {
					changed[n] = v
				}
			}
			text, err := json.Marshal(changed)
			if err != nil {
				t.Fatal(err)
			}
			return string(text)
		}
		refused("an unknown field", r.Method, path, "application/json", with("unknown", 1))
		for name, value := range fields {
			for _, wrong := range []any{nil, []int{1}, map[string]int{"a": 1}, true, 1.5, "wörd\x00"} {
				if fmt.Sprintf("%T", wrong) == fmt.Sprintf("%T", value) && name != "mode" && name != "scope" {
					continue // a string is as good as another here; the daemon judges it
				}
				refused("field "+name, r.Method, path, "application/json", with(name, wrong))
			}
		}
	}
	t.Logf("%d requests", requests)
	if requests < 300 {
		t.Errorf("only %d requests were made", requests)
	}
}
