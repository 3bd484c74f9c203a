import altair as alt, time, json
t=time.time()
data=alt.Data(values=[{"x":1,"y":2.0,"lo":1.9,"hi":2.1,"v":"sufficient"},{"x":4,"y":1.5,"lo":1.4,"hi":1.6,"v":"undecided"}])
b=alt.Chart(data)
c=alt.layer(
 b.mark_rule().encode(x=alt.X("x:Q",scale=alt.Scale(type="log")),y=alt.Y("lo:Q",scale=alt.Scale(zero=False)),y2="hi:Q"),
 b.mark_point(filled=True,size=80,opacity=1).encode(x="x:Q",y="y:Q",shape="v:N",color="v:N",tooltip=[alt.Tooltip("v:N",title="verdict")])).properties(width="container",height=300)
for i in range(3):
  t=time.time(); d=c.to_dict(); print(time.time()-t)
  t=time.time(); d=c.to_dict(validate=False); print('noval',time.time()-t)
print(json.dumps(d)[:1500])
import vl_convert as v
d["width"]=600
s=v.vegalite_to_svg(d); open('/tmp/w/page/t.svg','w').write(s); print(s[:3000])
