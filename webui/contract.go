package webui

// The path of a request to the contract (openapi.yaml):
//
//	gin's route ─▶ its operation ─▶ query known? type of body taken? body whole and in
//	bounds? ─▶ kin-openapi: parameters and body by their schemas ─▶ the generated server
//
// What does not hold is refused here, all of it at once and by its place, so that the
// daemon sees only what the contract allows.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/gin-gonic/gin"

	"sheaf/daemon/control/settings"
)

// basePath is where the contract's paths begin.
const basePath = "/api/v1"

// judgedByDaemon are the operations whose body is a settings file: package settings
// says what is wrong with it by line.
var judgedByDaemon = []string{"PutSettings", "CompareSettings"}

// contract is openapi.yaml, by the routes that gin knows.
type contract struct {
	document []byte // as JSON
	routes   map[string]*routers.Route
}

// theContract is read once for all handlers of the program.
var theContract = sync.OnceValues(newContract)

func newContract() (*contract, error) {
	document, err := GetSpecJSON()
	if err != nil {
		return nil, err
	}
	spec, err := GetSpec()
	if err != nil {
		return nil, err
	}
	k := &contract{document: document, routes: map[string]*routers.Route{}}
	toGin := strings.NewReplacer("{", ":", "}", "")
	for path, item := range spec.Paths.Map() {
		for method, operation := range item.Operations() {
			k.routes[method+" "+basePath+toGin.Replace(path)] = &routers.Route{
				Spec: spec, Path: path, PathItem: item, Method: method, Operation: operation,
			}
		}
	}
	return k, nil
}

// check refuses what the contract does not allow. The body can be read again behind it.
func (k *contract) check(rp reply) gin.HandlerFunc {
	return func(c *gin.Context) {
		route := k.routes[c.Request.Method+" "+c.FullPath()]
		if route == nil {
			return // not of the contract, as /healthz
		}
		if err := checkRequest(c, route); err != nil {
			rp.fail(c, err)
		}
	}
}

func checkRequest(c *gin.Context, route *routers.Route) error {
	if err := checkQuery(c, route); err != nil {
		return err
	}
	var types []string // none: the operation has no body
	if takes := route.Operation.RequestBody; takes != nil {
		types = slices.Sorted(maps.Keys(takes.Value.Content))
	}
	body, err := readBody(c, types...)
	if err != nil {
		return err
	}
	path := map[string]string{}
	for _, p := range c.Params {
		path[p.Key] = p.Value
	}
	err = openapi3filter.ValidateRequest(c.Request.Context(), &openapi3filter.RequestValidationInput{
		Request: c.Request, PathParams: path, Route: route,
		Options: &openapi3filter.Options{
			MultiError:          true,
			SkipSettingDefaults: true,
			ExcludeRequestBody:  slices.Contains(judgedByDaemon, route.Operation.OperationID),
			AuthenticationFunc:  openapi3filter.NoopAuthenticationFunc,
		},
	})
	c.Request.Body = io.NopCloser(bytes.NewReader(body))
	if err == nil {
		return nil
	}
	faults := faultsOf("", err)
	if len(faults) == 1 {
		return &Error{Code: CodeBadRequest, Detail: faults[0].String(), Problems: faults}
	}
	return &Error{Code: CodeBadRequest, Detail: fmt.Sprintf("%d things are wrong with the request", len(faults)), Problems: faults}
}

// checkQuery refuses parameters that the operation does not have: a wrong name would
// else be without effect.
func checkQuery(c *gin.Context, route *routers.Route) error {
	var known []string
	for _, list := range []openapi3.Parameters{route.PathItem.Parameters, route.Operation.Parameters} {
		for _, p := range list {
			if p.Value.In == openapi3.ParameterInQuery {
				known = append(known, p.Value.Name)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Request.URL.Query())) {
		if !slices.Contains(known, name) {
			return &Error{Code: CodeBadRequest, Detail: fmt.Sprintf("there is no parameter %q here; known are %q", name, known)}
		}
	}
	return nil
}

// readBody reads a whole body of one of the types, or sees that there is none. The type
// is demanded because a foreign web page can send a form to another server, but not these.
func readBody(c *gin.Context, types ...string) ([]byte, error) {
	body, err := io.ReadAll(c.Request.Body)
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		return nil, &Error{Code: CodeBodyTooLarge, Detail: fmt.Sprintf("the body is larger than %d bytes", tooLarge.Limit)}
	}
	if err != nil {
		return nil, &Error{Code: CodeBadRequest, Detail: "the body could not be read: " + err.Error()}
	}
	c.Request.Body = io.NopCloser(bytes.NewReader(body))
	if len(types) == 0 {
		if len(body) > 0 {
			return nil, &Error{Code: CodeBadRequest, Detail: "there is a body, and nothing to do with it"}
		}
		return nil, nil
	}
	if !slices.Contains(types, c.ContentType()) {
		return nil, &Error{Code: CodeUnsupportedMediaType,
			Detail: fmt.Sprintf("Content-Type is %q; it must be one of %q", c.ContentType(), types)}
	}
	if c.ContentType() != gin.MIMEJSON {
		return body, nil
	}
	// The decoder of the generated server would stop behind the first value.
	d := json.NewDecoder(bytes.NewReader(body))
	var v json.RawMessage
	if err := d.Decode(&v); err != nil {
		return nil, &Error{Code: CodeBadRequest, Detail: "the body is not JSON: " + err.Error()}
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, &Error{Code: CodeBadRequest, Detail: "the body goes on after its JSON value"}
	}
	return body, nil
}

// faultsOf is what a validation found, each by its place.
func faultsOf(where string, err error) []settings.Problem {
	switch e := err.(type) { //nolint:errorlint // a tree is walked here, each node for what it is itself
	case openapi3.MultiError:
		var all []settings.Problem
		for _, one := range e {
			all = append(all, faultsOf(where, one)...)
		}
		return all
	case *openapi3filter.RequestError:
		if e.Parameter != nil {
			where = e.Parameter.Name
		}
		if e.Err == nil {
			return []settings.Problem{{Path: where, Reason: e.Reason}}
		}
		return faultsOf(where, e.Err)
	case *openapi3.SchemaError:
		if place := strings.Join(e.JSONPointer(), "."); place != "" {
			where = strings.TrimPrefix(where+"."+place, ".")
		}
		return reasons(where, e.Reason)
	}
	return reasons(where, err.Error())
}

// reasons takes a report of the JSON Schema library apart, which names each place in a
// line of its own; another reason is one.
func reasons(where, text string) (list []settings.Problem) {
	for line := range strings.Lines(text) {
		at, reason, ok := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "- at '"), "': ")
		if ok && strings.Contains(line, "- at '") {
			place := strings.ReplaceAll(strings.TrimPrefix(at, "/"), "/", ".")
			list = append(list, settings.Problem{Path: strings.Trim(where+"."+place, "."), Reason: reason})
		}
	}
	if list == nil {
		return []settings.Problem{{Path: where, Reason: text}}
	}
	return list
}
